//! What an image is: references, digests, descriptors, platforms, and the walk from an index to its layers.
//!
//! Pure: nothing here may know kube, containerd or tokio. Whatever comes from outside (a pod's image string,
//! a blob from another node) is parsed here once, into types that cannot be wrong.

mod digest;
mod document;
mod platform;
pub mod quantity;
mod reference;
mod shape;

pub use digest::{Digest, DigestError, Verifier};
pub use document::{
    Descriptor, Document, DocumentError, Index, IndexEntry, MAX_CHILDREN, MAX_DOCUMENT_BYTES, Manifest,
    chain_ids, created, diff_ids,
};
pub use platform::Platform;
pub use reference::{Reference, ReferenceError};
