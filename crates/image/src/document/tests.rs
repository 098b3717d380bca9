use super::*;

#[test]
fn chains() {
    let ids: Vec<Digest> = [1, 2].map(|n| hex(n).parse().unwrap()).into();
    let chain = chain_ids(&ids);
    assert_eq!(chain[0], ids[0]);
    // printf 'sha256:01..01 sha256:02..02' | sha256sum
    assert_eq!(chain[1], Digest::sha256(format!("{} {}", hex(1), hex(2)).as_bytes()));
    assert_eq!(chain_ids(&[]), []);
}

fn hex(n: u8) -> String {
    format!("sha256:{}", format!("{n:02x}").repeat(32))
}

fn index() -> String {
    let entry = |n: u8, os: &str, arch: &str| {
        format!(
            r#"{{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"{}","size":7,"platform":{{"os":"{os}","architecture":"{arch}"}}}}"#,
            hex(n)
        )
    };
    format!(
        r#"{{"schemaVersion":2,"manifests":[{},{},{}]}}"#,
        entry(1, "linux", "arm64"),
        entry(2, "linux", "amd64"),
        entry(3, "unknown", "unknown")
    )
}

#[test]
fn knows_when_an_image_was_made_if_it_says_so() {
    let of = |member: &str| {
        let text = format!(
            r#"{{{member}"os":"linux","architecture":"amd64","rootfs":{{"type":"layers","diff_ids":[]}}}}"#
        );
        assert!(diff_ids(text.as_bytes()).is_ok());
        created(text.as_bytes())
    };
    assert_eq!(of(r#""created":"2026-01-01T01:00:00.5+01:00","#), 1_767_225_600);
    for unknown in ["", r#""created":"1970-01-01T00:00:00Z","#, r#""created":"0001-01-01T00:00:00Z","#] {
        assert_eq!(of(unknown), 0, "{unknown}");
    }
    assert_eq!(of(r#""created":"yesterday","#), 0);
    assert_eq!(created(b"{}"), 0);
}

#[test]
fn picks_the_platform() {
    let Document::Index(index) = Document::parse(index().as_bytes()).unwrap() else { panic!("an index") };
    let chosen = index.candidates(&Platform::new("linux", "amd64", "")).unwrap();
    assert_eq!(chosen.len(), 1);
    assert_eq!(chosen[0].descriptor.digest.as_str(), hex(2));
    let error = index.candidates(&Platform::new("linux", "s390x", "")).unwrap_err().to_string();
    assert_eq!(error, "the index has no manifest for linux/s390x, only for linux/arm64, linux/amd64");
}

#[test]
fn counts_a_layer_once() {
    let layer = format!(
        r#"{{"mediaType":"application/vnd.docker.image.rootfs.diff.tar.gzip","digest":"{}","size":10}}"#,
        hex(9)
    );
    let text = format!(
        r#"{{"schemaVersion":2,"mediaType":"application/vnd.docker.distribution.manifest.v2+json","config":{{"mediaType":"application/vnd.docker.container.image.v1+json","digest":"{}","size":3}},"layers":[{layer},{layer}]}}"#,
        hex(8)
    );
    let Document::Manifest(manifest) = Document::parse(text.as_bytes()).unwrap() else {
        panic!("a manifest")
    };
    assert_eq!(manifest.layers.len(), 2);
    assert_eq!(manifest.content_size(), 13);
    assert_eq!(manifest.layers[0].media_type, "application/vnd.docker.image.rootfs.diff.tar.gzip");
}

#[test]
fn knows_its_media_type() {
    let of = |stated: &str| {
        let text = format!(r#"{{"schemaVersion":2,{stated}"manifests":[]}}"#);
        Document::parse(text.as_bytes()).unwrap().media_type(text.as_bytes())
    };
    assert_eq!(of("").unwrap(), "application/vnd.oci.image.index.v1+json");
    let docker = "application/vnd.docker.distribution.manifest.list.v2+json";
    assert_eq!(of(&format!(r#""mediaType":"{docker}","#)).unwrap(), docker);
    assert!(of(r#""mediaType":"application/vnd.oci.image.manifest.v1+json","#).is_err());
}

/// As many members as fit take no memory to speak of, if nobody asks for them.
#[test]
fn keeps_nothing_of_a_config_but_what_is_wanted() {
    let of = |history: usize, ids: usize| {
        let (history, ids) = (vec!["{}"; history].join(","), vec![format!("{:?}", hex(1)); ids].join(","));
        format!(
            r#"{{"os":"linux","architecture":"amd64","history":[{history}],"rootfs":{{"type":"layers","diff_ids":[{ids}]}}}}"#
        )
    };
    let (platform, ids) = diff_ids(of(1_000_000, MAX_CHILDREN).as_bytes()).unwrap();
    assert_eq!((platform.to_string().as_str(), ids.len()), ("linux/amd64", MAX_CHILDREN));
    let error = diff_ids(of(0, MAX_CHILDREN + 1).as_bytes()).unwrap_err().to_string();
    assert!(error.contains("more than 1024 members"), "{error}");
}

#[test]
fn refuses_what_it_cannot_trust() {
    let long = format!(r#"{{"schemaVersion":2,"manifests":[{}]}}"#, vec!["0"; 2000].join(","));
    for (text, says) in [
        ("", "not valid"),
        ("[]", "it is no object"),
        (r#"{"mediaType":"","manifests":[]}"#, "no schemaVersion"),
        (r#"{"schemaVersion":2,"manifests":[],"layers":null}"#, "both"),
        (r#"{"schemaVersion":2,"manifests":[],"manifests":[]}"#, "duplicate"),
        (r#"{"schemaVersion":2,"manifests":{}}"#, "an array"),
        (r#"{"schemaVersion":1,"fsLayers":[]}"#, "schema version 1"),
        (r#"{"schemaVersion":2}"#, "neither"),
        (r#"{"schemaVersion":2,"manifests":[],"layers":[]}"#, "both"),
        (r#"{"schemaVersion":2,"manifests":[{"mediaType":"x","size":1,"digest":"sha256:../x"}]}"#, ""),
        (long.as_str(), "2000 children"),
    ] {
        let error = Document::parse(text.as_bytes()).unwrap_err().to_string();
        assert!(error.contains(says), "{text}: {error}");
    }
}
