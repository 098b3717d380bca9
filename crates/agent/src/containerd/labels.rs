//! The labels by which containerd's garbage collection finds an image's blobs. Pure.

use tote_image::Document;

use super::Labels;

/// The labels that keep what a document names, as a pull sets them (containerd `images.ChildGCLabels`): all
/// manifests of an index, whether they are here or not; config and layers of a manifest.
pub fn gc_labels(document: &Document) -> Labels {
    let label = |suffix: String, child: &tote_image::Descriptor| {
        (format!("containerd.io/gc.ref.content.{suffix}"), child.digest.to_string())
    };
    match document {
        Document::Index(index) => {
            let entries = index.manifests.iter().enumerate();
            entries.map(|(i, entry)| label(format!("m.{i}"), &entry.descriptor)).collect()
        }
        Document::Manifest(manifest) => {
            let layers = manifest.layers.iter().enumerate();
            let layers = layers.map(|(i, layer)| label(format!("l.{i}"), layer));
            layers.chain([label("config".to_owned(), &manifest.config)]).collect()
        }
    }
}
