//! One image on one node, as its agent tells it. Pure; must not know of other nodes.

use std::collections::BTreeSet;
use std::sync::Arc;

use tote_image::{Digest, MAX_CHILDREN, Platform};
use tote_rpc::v1;

use crate::access::Pulled;

/// All image records of a node with one target.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Image {
    /// Digest of the index or manifest that the records point at.
    pub target: Digest,
    /// Names of the records.
    pub names: Vec<Arc<str>>,
    /// The manifests below (or equal to) the target that the node has.
    pub manifests: Vec<Manifest>,
}

/// A platform's manifest on a node.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Manifest {
    /// Its digest.
    pub digest: Digest,
    /// The platform it is for.
    pub platform: Platform,
    /// Whether config and layers are all there.
    pub complete: bool,
    /// Whether containers can be made of it although it is not complete: it stands unpacked.
    pub unpacked: bool,
    /// Config and layers that are not there; `None` if some are, and the agent does not tell which.
    pub missing: Option<BTreeSet<Digest>>,
    /// Bytes of manifest, config and layers, compressed.
    pub size: u64,
    /// When its config says the image was made, in seconds since 1970; 0 if that is not known.
    pub created: i64,
    /// The config's digest: what CRI, and so kubelet, knows the image by.
    pub image_id: Option<Digest>,
    /// What the node's kubelet has written down about who may have it.
    pub pulled: Option<Arc<Pulled>>,
}

/// How a node holds a digest, as seen by a node of some platform.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Holder {
    /// With every blob of a manifest that suits the platform.
    Complete,
    /// A manifest suits the platform, but blobs are missing.
    Incomplete,
    /// No manifest that it has suits the platform.
    OtherPlatform,
}

/// What an agent says that it lacks. A digest that is none would never be found elsewhere either.
fn missing(manifest: &v1::Manifest) -> Option<BTreeSet<Digest>> {
    let missing = manifest.missing.iter().take(MAX_CHILDREN + 1).map(|digest| digest.parse().ok());
    let missing: BTreeSet<Digest> = missing.collect::<Option<_>>()?;
    (manifest.complete || !missing.is_empty()).then_some(missing)
}

impl Image {
    /// Takes an agent's word for an image; one with a malformed digest is nobody's.
    pub fn from_wire(image: &v1::Image) -> Option<Self> {
        let platform = |p: Option<&v1::Platform>| {
            p.map_or_else(|| Platform::new("", "", ""), |p| Platform::new(&p.os, &p.architecture, &p.variant))
        };
        Some(Self {
            target: image.target.as_ref()?.digest.parse().ok()?,
            names: image.names.iter().map(|name| name.as_str().into()).collect(),
            manifests: image
                .manifests
                .iter()
                .filter_map(|m| {
                    Some(Manifest {
                        digest: m.digest.parse().ok()?,
                        platform: platform(m.platform.as_ref()),
                        complete: m.complete,
                        unpacked: m.unpacked,
                        missing: missing(m),
                        size: u64::try_from(m.size).unwrap_or_default(),
                        created: m.created.max(0),
                        image_id: m.config_digest.parse().ok(),
                        pulled: m.pulled.as_ref().map(|record| Arc::new(Pulled::from_wire(record))),
                    })
                })
                .collect(),
        })
    }

    /// How the node holds `digest`, for a node of `platform`; if that is not known, any platform will do.
    pub(super) fn held(&self, digest: &Digest, platform: Option<&Platform>) -> Holder {
        self.manifests
            .iter()
            .filter(|m| self.target == *digest || m.digest == *digest)
            .map(|m| match platform {
                Some(platform) if platform.rank(&m.platform).is_none() => Holder::OtherPlatform,
                _ if m.complete => Holder::Complete,
                _ => Holder::Incomplete,
            })
            .min()
            .unwrap_or(Holder::Incomplete)
    }

    /// Whether containers can be made of `digest` on a node of `platform`: its blobs are all there, or it stands unpacked.
    pub(super) fn is_usable(&self, digest: &Digest, platform: &Platform) -> bool {
        self.suiting(digest, Some(platform)).any(|m| m.complete || m.unpacked)
    }

    /// The manifests that `digest` (of the target or of one of them) is, for `platform`.
    pub(super) fn suiting<'a, 'q>(
        &'a self,
        digest: &'q Digest,
        platform: Option<&'q Platform>,
    ) -> impl Iterator<Item = &'a Manifest> + use<'a, 'q> {
        let is = self.manifests.iter().filter(move |m| self.target == *digest || m.digest == *digest);
        is.filter(move |m| platform.is_none_or(|p| p.rank(&m.platform).is_some()))
    }

    /// Digests of the target and of the manifests below it.
    pub(super) fn digests(&self) -> impl Iterator<Item = &Digest> {
        let below = self.manifests.iter().map(|m| &m.digest).filter(|digest| **digest != self.target);
        std::iter::once(&self.target).chain(below)
    }

    /// By image ID, the kubelet's records that it comes with.
    pub(super) fn pulled(&self) -> impl Iterator<Item = (&Digest, &Arc<Pulled>)> {
        self.manifests.iter().filter_map(|m| m.image_id.as_ref().zip(m.pulled.as_ref()))
    }

    /// The records that bear a reference: CRI's own record of the config ID is none.
    pub(super) fn references(&self) -> impl Iterator<Item = &Arc<str>> {
        self.names.iter().filter(|name| !name.starts_with("sha256:"))
    }
}
