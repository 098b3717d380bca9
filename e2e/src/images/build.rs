//! Writing the documents of an image: config, manifest, index, attestations.

use super::{Descriptor, Image, Layer, Layout, MediaTypes, Platform, PlatformImage};
use anyhow::Result;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

/// When every image was made that does not say otherwise.
const CREATED: &str = "2024-01-01T00:00:00Z";

/// One platform of an image, to be written.
#[derive(Clone, Debug)]
pub struct Build {
    platform: Platform,
    media_types: MediaTypes,
    layers: Vec<Layer>,
    config: Map<String, Value>,
    created: String,
}

impl Default for Build {
    fn default() -> Self {
        Self::new()
    }
}

impl Build {
    /// An image of no layers for this machine's platform, OCI media types, whose command sleeps for ever and
    /// whose stop signal is SIGKILL, so that a pod that is deleted is gone at once.
    pub fn new() -> Self {
        let Value::Object(config) = json!({
            "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
            "Cmd": ["/bin/busybox", "sleep", "infinity"],
            "WorkingDir": "/",
            "StopSignal": "SIGKILL",
        }) else {
            unreachable!("the literal above is an object")
        };
        Self {
            platform: Platform::host(),
            media_types: MediaTypes::Oci,
            layers: Vec::new(),
            config,
            created: CREATED.to_owned(),
        }
    }

    /// Sets when it was made by its config, RFC 3339.
    #[must_use]
    pub fn created(mut self, at: &str) -> Self {
        at.clone_into(&mut self.created);
        self
    }

    /// Adds a layer on top.
    #[must_use]
    pub fn layer(mut self, layer: Layer) -> Self {
        self.layers.push(layer);
        self
    }

    /// Sets the platform.
    #[must_use]
    pub fn platform(mut self, platform: Platform) -> Self {
        self.platform = platform;
        self
    }

    /// Sets the media types.
    #[must_use]
    pub fn media_types(mut self, media_types: MediaTypes) -> Self {
        self.media_types = media_types;
        self
    }

    /// Sets a field of the config's `config` object, under its name in the image specification (`Cmd`, `User`).
    #[must_use]
    pub fn config(mut self, field: &str, value: Value) -> Self {
        self.config.insert(field.to_owned(), value);
        self
    }

    /// Removes a field of the config's `config` object.
    #[must_use]
    pub fn without_config(mut self, field: &str) -> Self {
        self.config.remove(field);
        self
    }

    /// Writes the image without an index: the target is the manifest.
    ///
    /// # Errors
    /// If a blob cannot be written or the layers do not fit the media types.
    pub fn write(self, layout: &Layout) -> Result<Image> {
        let built = self.write_platform(layout)?;
        let target = Descriptor { platform: None, ..built.manifest.clone() };
        Ok(Image { layout: layout.clone(), target, platforms: vec![built] })
    }

    fn write_platform(self, layout: &Layout) -> Result<PlatformImage> {
        let (mut layers, mut diff_ids) = (Vec::new(), Vec::new());
        for layer in &self.layers {
            let media_type = self.media_types.layer(layer.compression)?;
            let (descriptor, diff_id) = layout.put_layer(media_type, layer)?;
            layers.push(descriptor);
            diff_ids.push(diff_id);
        }
        self.finish(layout, layers, diff_ids)
    }

    /// Writes config and manifest over layers that the layout already holds.
    pub(super) fn finish(
        self,
        layout: &Layout,
        layers: Vec<Descriptor>,
        diff_ids: Vec<String>,
    ) -> Result<PlatformImage> {
        let config = layout.put_json(
            self.media_types.config(),
            &json!({
                "architecture": self.platform.architecture,
                "os": self.platform.os,
                "created": self.created,
                "config": self.config,
                "rootfs": {"type": "layers", "diff_ids": diff_ids},
                "history": diff_ids.iter().enumerate().map(|(i, _)| json!({
                    "created": self.created, "created_by": format!("layer {i}"),
                })).collect::<Vec<_>>(),
            }),
        )?;
        let manifest = layout.put_json(
            self.media_types.manifest(),
            &json!({
                "schemaVersion": 2,
                "mediaType": self.media_types.manifest(),
                "config": config,
                "layers": layers,
            }),
        )?;
        let manifest = Descriptor { platform: Some(self.platform.clone()), ..manifest };
        Ok(PlatformImage { platform: self.platform, manifest, config, layers, diff_ids })
    }
}

/// An image with an index.
#[derive(Clone, Debug)]
pub struct BuildIndex {
    builds: Vec<Build>,
    attested: bool,
    media_types: MediaTypes,
}

impl BuildIndex {
    /// An index of the platforms given, in that order.
    pub fn new(builds: impl IntoIterator<Item = Build>) -> Self {
        Self { builds: builds.into_iter().collect(), attested: false, media_types: MediaTypes::Oci }
    }

    /// Adds an attestation manifest for each platform, as `BuildKit` does: platform `unknown/unknown`, an
    /// in-toto statement in place of a layer, annotations that name the manifest it speaks of.
    #[must_use]
    pub fn attested(mut self) -> Self {
        self.attested = true;
        self
    }

    /// Sets the index's media type (the platforms have their own).
    #[must_use]
    pub fn media_types(mut self, media_types: MediaTypes) -> Self {
        self.media_types = media_types;
        self
    }

    /// Writes all blobs and the index.
    ///
    /// # Errors
    /// As [`Build::write`].
    pub fn write(self, layout: &Layout) -> Result<Image> {
        let mut platforms = self
            .builds
            .into_iter()
            .map(|b| b.write_platform(layout))
            .collect::<Result<Vec<PlatformImage>>>()?;
        if self.attested {
            let attestations =
                platforms.iter().map(|p| attestation(layout, p)).collect::<Result<Vec<PlatformImage>>>()?;
            platforms.extend(attestations);
        }
        let target = layout.put_json(
            self.media_types.index(),
            &json!({
                "schemaVersion": 2,
                "mediaType": self.media_types.index(),
                "manifests": platforms.iter().map(|p| &p.manifest).collect::<Vec<_>>(),
            }),
        )?;
        Ok(Image { layout: layout.clone(), target, platforms })
    }
}

/// The shape of `BuildKit`'s attestation storage (docs/attestations/attestation-storage.md there).
fn attestation(layout: &Layout, of: &PlatformImage) -> Result<PlatformImage> {
    let statement = layout.put_json(
        "application/vnd.in-toto+json",
        &json!({
            "_type": "https://in-toto.io/Statement/v0.1",
            "predicateType": "https://slsa.dev/provenance/v0.2",
            "subject": [{"name": "_", "digest": {"sha256": of.manifest.digest.trim_start_matches("sha256:")}}],
            "predicate": {"builder": {"id": ""}, "buildType": "https://mobyproject.org/buildkit@v1"},
        }),
    )?;
    let statement = Descriptor {
        annotations: BTreeMap::from([(
            "in-toto.io/predicate-type".to_owned(),
            "https://slsa.dev/provenance/v0.2".to_owned(),
        )]),
        ..statement
    };
    let unknown = Platform { architecture: "unknown".to_owned(), os: "unknown".to_owned() };
    let diff_ids = vec![statement.digest.clone()];
    let mut built =
        Build::new().platform(unknown).without_config("Cmd").finish(layout, vec![statement], diff_ids)?;
    built.manifest.annotations = BTreeMap::from([
        ("vnd.docker.reference.digest".to_owned(), of.manifest.digest.clone()),
        ("vnd.docker.reference.type".to_owned(), "attestation-manifest".to_owned()),
    ]);
    Ok(built)
}
