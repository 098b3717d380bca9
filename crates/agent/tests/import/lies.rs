//! Who lies: a source about a blob, or the image about its own. Content is named by its digest, so a manifest that has the
//! digest asked for IS the image: what it says of its children is the same whichever source it came from. Then no other
//! source can help, and none is blamed.

use bytes::Bytes;
use serde_json::{Value, json};
use tote_agent::bandwidth::Bandwidth;
use tote_agent::containerd::{Containerd as _, Fake};
use tote_agent::import::{Imports, Lifetimes};
use tote_agent::testing::Blobs;
use tote_image::Digest;
use tote_rpc::v1::{self, Cause};

use crate::peers::{Peer, Trick, context, counted, import, request};
use crate::{NAME, check_complete, check_nothing, image, large_image};

/// An import, and the metric of lies after it.
async fn told(target: &Fake, image: &Blobs, peers: &[&Peer]) -> (Result<v1::Done, v1::Failed>, Vec<String>) {
    let context = context(target, Bandwidth::default());
    let metrics = context.metrics.clone();
    let imports = Imports::new(context, Lifetimes::default());
    let outcome = import(&imports, request("t", NAME, image, peers)).await;
    if let Err(failed) = &outcome {
        assert_eq!(target.images().await.unwrap(), [], "nothing is visible");
        if failed.retryable {
            // What it has got is kept for another try, until the leader gives up.
            imports.cancel(&request("t", NAME, image, &[]).id).await.unwrap();
        }
        check_nothing(target).await;
    }
    (outcome, counted(&metrics, "tote_agent_lies_total"))
}

fn once(peer: &Peer) -> String {
    format!("tote_agent_lies_total{{node=\"{}\"}} 1", peer.node)
}

/// A source that lies of one blob.
struct Lie {
    what: &'static str,
    image: Blobs,
    blob: Digest,
    trick: Trick,
    /// What comes of it where there is no other source. What only one source says of a length proves nothing.
    alone: (Cause, &'static str),
}

fn lies() -> Vec<Lie> {
    let (small, large, indexed) = (image(), large_image(), image().indexed());
    let (layer, part) = (small.layers[0].digest.clone(), large.layers[0].digest.clone());
    let (config, manifest) = (small.config.digest.clone(), indexed.manifest.digest.clone());
    let index = indexed.target.digest.clone();
    let much = Trick::Given(Bytes::from(vec![b' '; 5 << 20]));
    let wrong = (Cause::DigestMismatch, "another digest");
    let sized = (Cause::NoSource, "says that it has");
    let unheld = (Cause::Platform, "says that it has");
    let lie = |what, image: &Blobs, blob: &Digest, trick, alone| Lie {
        what,
        image: image.clone(),
        blob: blob.clone(),
        trick,
        alone,
    };
    vec![
        lie("other bytes of a layer", &small, &layer, Trick::Wrong, wrong),
        lie("other bytes of a config", &small, &config, Trick::Wrong, wrong),
        lie("other bytes of a manifest", &indexed, &manifest, Trick::Wrong, wrong),
        lie("other bytes of an index", &indexed, &index, Trick::Wrong, wrong),
        lie("a layer that is longer", &small, &layer, Trick::Sized(1), sized),
        lie("a layer that is shorter", &small, &layer, Trick::Sized(-1), sized),
        lie("a layer in parts that is longer", &large, &part, Trick::Sized(1), sized),
        lie("a layer in parts that is shorter", &large, &part, Trick::Sized(-1), sized),
        lie("a config that is longer", &small, &config, Trick::Sized(1), wrong),
        lie("a manifest that is shorter", &indexed, &manifest, Trick::Sized(-1), wrong),
        lie(
            "a layer that ends early",
            &small,
            &layer,
            Trick::Short(1000),
            (Cause::DigestMismatch, "bytes early"),
        ),
        lie("a layer without end", &small, &layer, Trick::Endless, (Cause::DigestMismatch, "more bytes")),
        lie("a manifest over 4 MiB", &indexed, &manifest, much.clone(), unheld),
        lie("an index over 4 MiB", &indexed, &index, much, sized),
        lie("an index without end", &indexed, &index, Trick::Endless, (Cause::DigestMismatch, "more bytes")),
    ]
}

/// Alone it is named in the error; beside an honest one the image arrives, and it is named in the end and counted.
#[tokio::test]
async fn a_source_that_lies_is_named_and_another_is_tried() {
    for Lie { what, image, blob, trick, alone } in lies() {
        let (liar, honest) = (Peer::holding(&image, NAME).await, Peer::holding(&image, NAME).await);
        liar.trick(&blob, trick);

        let (outcome, lies) = told(&Fake::default(), &image, &[&liar]).await;
        let failed = outcome.expect_err(what);
        assert_eq!((failed.cause(), failed.retryable), (alone.0, true), "{what}: {}", failed.message);
        for part in [blob.as_str(), &liar.node, alone.1] {
            assert!(failed.message.contains(part), "{what}: {part} is not in {}", failed.message);
        }
        let proven = alone.0 == Cause::DigestMismatch;
        assert_eq!(lies, if proven { vec![once(&liar)] } else { vec![] }, "{what}");

        let target = Fake::default();
        let (outcome, lies) = told(&target, &image, &[&liar, &honest]).await;
        let done = outcome.unwrap_or_else(|failed| panic!("{what}: {failed:?}"));
        assert_eq!(done.lying_nodes, [liar.node.clone()], "{what}");
        assert_eq!(lies, [once(&liar)], "{what}");
        check_complete(&target, &image, NAME).await;
    }
}

/// Where the import fails for another blob, or for want of space, who lied of the first is named all the same.
#[tokio::test]
async fn a_source_that_lied_is_named_though_something_else_fails() {
    let image = image();
    let (first, second) = (&image.layers[0].digest, &image.layers[1].digest);
    for is_full in [false, true] {
        let (liar, honest) = (Peer::holding(&image, NAME).await, Peer::holding(&image, NAME).await);
        let target = Fake::default();
        liar.trick(&image.config.digest, Trick::Wrong);
        for peer in [&liar, &honest] {
            peer.trick(second, Trick::Status(404));
        }
        if is_full {
            target.free_bytes(50_000); // Room for the documents.
        }
        let (outcome, lies) = told(&target, &image, &[&liar, &honest]).await;
        let failed = outcome.unwrap_err();
        let cause = if is_full { Cause::DiskFull } else { Cause::NoSource };
        assert_eq!(failed.cause(), cause, "{}", failed.message);
        assert_eq!(failed.lying_nodes, [liar.node.clone()], "{}", failed.message);
        assert_eq!(lies, [once(&liar)]);
        assert!(!is_full || honest.asked(first) == 0);
    }
}

/// Whatever it lied of, nothing more of the image is asked of it where another has it.
#[tokio::test]
async fn who_has_lied_is_asked_no_more() {
    let image = image().indexed();
    let (liar, honest) = (Peer::holding(&image, NAME).await, Peer::holding(&image, NAME).await);
    liar.trick(&image.config.digest, Trick::Wrong);
    let target = Fake::default();
    let done = told(&target, &image, &[&liar, &honest]).await.0.unwrap();
    assert_eq!(done.lying_nodes, [liar.node.clone()]);
    for layer in &image.layers {
        assert_eq!(liar.asked(&layer.digest), 0);
    }
    check_complete(&target, &image, NAME).await;
    // Where nobody else has it, it is: the digest tells what it is worth.
    for layer in &image.layers {
        honest.trick(&layer.digest, Trick::Status(404));
    }
    let target = Fake::default();
    told(&target, &image, &[&liar, &honest]).await.0.unwrap();
    check_complete(&target, &image, NAME).await;
}

/// An image that lies of its own blobs.
struct Bad {
    what: &'static str,
    image: Blobs,
    /// What the error names.
    blob: Digest,
    cause: Cause,
    retryable: bool,
    says: &'static str,
    /// Of documents that an agent would not give.
    given: bool,
}

/// Edits an image's target.
fn edited(mut image: Blobs, edit: impl FnOnce(&mut Value)) -> Blobs {
    let mut document = serde_json::from_slice(&image.bytes[&image.target.digest]).unwrap();
    edit(&mut document);
    image.retarget(document.to_string().into_bytes());
    image
}

fn with_type(media_type: &str, of: &str) -> Blobs {
    edited(image(), |manifest| *manifest.pointer_mut(&format!("{of}/mediaType")).unwrap() = json!(media_type))
}

/// An index of so many manifests for this platform, none of which anybody has.
fn wide(manifests: usize) -> Blobs {
    edited(image().indexed(), |index| {
        let mut entry = index["manifests"][1].clone();
        let entries = (0..manifests).map(|n| {
            entry["digest"] = json!(Digest::sha256(&n.to_le_bytes()).to_string());
            entry.clone()
        });
        index["manifests"] = entries.collect();
    })
}

fn absent(n: usize) -> Digest {
    Digest::sha256(&n.to_le_bytes())
}

/// An index whose manifest for this platform is an index, which names one that is an index.
fn nested() -> Blobs {
    let inner = image().indexed();
    let mut middle = edited(inner.clone(), |index| {
        index["manifests"][1]["digest"] = json!(inner.target.digest.to_string());
        index["manifests"][1]["size"] = json!(inner.target.size);
    });
    middle.bytes.extend(inner.bytes);
    let mut outer = edited(middle.clone(), |index| {
        index["manifests"][1]["digest"] = json!(middle.target.digest.to_string());
        index["manifests"][1]["size"] = json!(middle.target.size);
    });
    outer.bytes.extend(middle.bytes);
    // The manifest that is not to be asked for.
    outer.manifest = middle.target;
    outer
}

#[allow(clippy::too_many_lines, reason = "a table, a line a case")]
fn bad() -> Vec<Bad> {
    let sized = |mut image: Blobs, of: &str, more: i64| {
        image = edited(image, |document| {
            let size = document.pointer_mut(&format!("{of}/size")).unwrap();
            *size = json!(size.as_i64().unwrap() + more);
        });
        image
    };
    let (small, indexed, nested) = (image(), image().indexed(), nested());
    let (config, manifest) = (&small.config.digest, &indexed.manifest.digest);
    let layer = &small.layers[0].digest;
    let (first, part) = (small.layers[1].digest.clone(), large_image().layers[0].digest.clone());
    let refused = |what, image: Blobs, blob: &Digest, says| Bad {
        what,
        image,
        blob: blob.clone(),
        cause: Cause::Unsupported,
        retryable: false,
        says,
        given: false,
    };
    let target = |image: &Blobs| image.target.digest.clone();
    let given =
        |what, image: Blobs, says| Bad { given: true, ..refused(what, image.clone(), &target(&image), says) };
    // Who is right about a layer's length no one can tell who has not got all of it: it may be had from another source.
    let disputed = |what, image, blob: &Digest| Bad {
        cause: Cause::NoSource,
        retryable: true,
        ..refused(what, image, blob, "says that it has")
    };
    let foreign = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip";
    let held_back = "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip";
    let mut cases = vec![
        refused(
            "a config of another size",
            sized(small.clone(), "/config", 1),
            config,
            "bytes, the image says",
        ),
        refused(
            "a manifest of another size",
            sized(indexed.clone(), "/manifests/1", -1),
            manifest,
            "the image says",
        ),
        refused(
            "a manifest over 4 MiB",
            sized(indexed.clone(), "/manifests/1", 4 << 20),
            manifest,
            "at most",
        ),
        disputed("a layer of one byte more", sized(small.clone(), "/layers/1", 1), &first),
        disputed("a layer of one byte less", sized(small.clone(), "/layers/1", -1), &first),
        disputed("a layer in parts of one byte more", sized(large_image(), "/layers/0", 1), &part),
        disputed("a layer in parts of one byte less", sized(large_image(), "/layers/0", -1), &part),
        disputed("a layer of a part more", sized(large_image(), "/layers/0", 4 << 20), &part),
        refused(
            "a layer of no bytes",
            sized(small.clone(), "/layers/1", -i64::try_from(small.layers[1].size).unwrap()),
            &first,
            "has 0 bytes",
        ),
        refused("an index in an index", nested.clone(), &nested.manifest.digest, "an index within an index"),
        given("an index of too many", wide(1025), "1025 children"),
        Bad {
            cause: Cause::Platform,
            retryable: true,
            ..refused("an index of many that nobody has", wide(1024), &absent(15), "refuses")
        },
        refused(
            "a config that is none",
            with_type("application/vnd.cncf.helm.config.v1+json", "/config"),
            config,
            "no container image's",
        ),
        refused(
            "a layer that is none",
            with_type("application/vnd.wasm.content.layer.v1+wasm", "/layers/0"),
            layer,
            "cannot be unpacked",
        ),
        refused(
            "a layer of an unknown kind",
            with_type("application/vnd.oci.image.layer.v1.tar+bogus", "/layers/0"),
            layer,
            "cannot be unpacked",
        ),
        refused(
            "an encrypted layer",
            with_type("application/vnd.oci.image.layer.v1.tar+gzip+encrypted", "/layers/0"),
            layer,
            "cannot be unpacked",
        ),
        refused("a foreign layer", with_type(foreign, "/layers/0"), layer, "not to be given on"),
        refused(
            "a layer not to be distributed",
            with_type(held_back, "/layers/0"),
            layer,
            "not to be given on",
        ),
        given("a manifest of an unknown type", with_type("application/x", ""), "not that of such a document"),
        given(
            "a manifest that is an index, too",
            edited(small.clone(), |manifest| manifest["manifests"] = json!([])),
            "both",
        ),
    ];
    let mut much = small.clone();
    much.retarget(vec![b' '; 5 << 20]);
    cases.push(Bad {
        cause: Cause::NoSource,
        retryable: true,
        ..given("a target over 4 MiB", much, "says that it has 5242880 bytes, and 4194304 are due")
    });
    cases
}

/// Whichever source it comes from: the error names the blob, no source is blamed, and no layer was asked for.
#[tokio::test]
async fn an_image_that_lies_of_its_blobs_is_refused_and_no_source_is_blamed() {
    for Bad { what, image, blob, cause, retryable, says, given } in bad() {
        let (one, two) = (Peer::holding(&image, NAME).await, Peer::holding(&image, NAME).await);
        let target = &image.target.digest;
        if given {
            for peer in [&one, &two] {
                peer.trick(target, Trick::Given(image.bytes[target].clone().into()));
            }
        }
        for peers in [&[&one][..], &[&one, &two]] {
            let (outcome, lies) = told(&Fake::default(), &image, peers).await;
            let failed = outcome.expect_err(what);
            let found = (failed.cause(), failed.retryable);
            assert_eq!(found, (cause, retryable), "{what}: {}", failed.message);
            for part in [blob.as_str(), says] {
                assert!(failed.message.contains(part), "{what}: {part} is not in {}", failed.message);
            }
            if retryable {
                for peer in peers {
                    assert!(failed.message.contains(&peer.node), "{what}: {}", failed.message);
                }
            }
            assert_eq!(lies, [""; 0], "{what}");
        }
        let layers = if cause == Cause::NoSource { &[][..] } else { &image.layers };
        for layer in layers {
            assert_eq!(one.asked(&layer.digest) + two.asked(&layer.digest), 0, "{what}");
        }
    }
}

/// An index that leads to ever more is not followed: a bound of requests, whatever it holds.
#[tokio::test]
async fn no_index_makes_an_agent_ask_for_much() {
    let (nested, wide) = (nested(), wide(1024));
    let (deep, broad) = (Peer::holding(&nested, NAME).await, Peer::holding(&wide, NAME).await);
    told(&Fake::default(), &nested, &[&deep]).await.0.unwrap_err();
    let asked: usize = nested.digests().iter().map(|digest| deep.asked(digest)).sum();
    assert_eq!(asked, 2, "the index, and the one within");
    told(&Fake::default(), &wide, &[&broad]).await.0.unwrap_err();
    let asked: usize = (0..1024).map(|n| broad.asked(&absent(n))).sum();
    assert_eq!(asked, 16 * 3, "so many manifests, in each of the rounds");
}

/// What lies on the node itself is bounded alike.
#[tokio::test]
async fn a_manifest_over_4_mib_that_is_here_is_not_read() {
    let (mut image, target) = (image(), Fake::default());
    image.retarget(vec![b' '; 5 << 20]);
    target.put(&image.bytes[&image.target.digest], [].into());
    let imports = Imports::new(context(&target, Bandwidth::default()), Lifetimes::default());
    let failed = import(&imports, request("t", NAME, &image, &[])).await.unwrap_err();
    assert_eq!((failed.cause(), failed.retryable), (Cause::Unsupported, false), "{}", failed.message);
    assert!(failed.message.contains(image.target.digest.as_str()), "{}", failed.message);
}
