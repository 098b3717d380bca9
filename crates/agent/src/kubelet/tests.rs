//! Records as kubelet 1.36 writes them (the examples are those that its own tests read), and what is made of them.

use std::os::unix::fs::PermissionsExt;

use tote_rpc::v1;

use super::*;

const SECRET: &str = r#"{"kind":"ImagePulledRecord","apiVersion":"kubelet.config.k8s.io/v1beta1","lastUpdatedTime":"2024-10-21T12:26:40Z","imageRef":"testimageref","credentialMapping":{"docker.io/testing/test":{"kubernetesSecrets":[{"uid":"testsecretuid","namespace":"default","name":"pull-secret","credentialHash":"testsecrethash"}]}}}"#;
const ACCOUNT: &str = r#"{"kind":"ImagePulledRecord","apiVersion":"kubelet.config.k8s.io/v1alpha1","lastUpdatedTime":"2024-10-21T12:26:40Z","imageRef":"testimageref-sa","credentialMapping":{"docker.io/testing/test":{"kubernetesServiceAccounts":[{"uid":"test-sa-uid","namespace":"default","name":"test-sa"}]}}}
"#;
const EVERYBODY: &str = r#"{"kind":"ImagePulledRecord","apiVersion":"kubelet.config.k8s.io/v1beta1","lastUpdatedTime":"2024-10-21T12:26:40Z","imageRef":"testimage-anonpull","credentialMapping":{"docker.io/testing/test":{"nodePodsAccessible":true}}}"#;
const NOBODY: &str = r#"{"kind":"ImagePulledRecord","apiVersion":"kubelet.config.k8s.io/v1beta1","lastUpdatedTime":"2024-10-21T12:26:40Z","imageRef":"testemptycredmapping"}"#;
const BROKEN: &str = r#"{"kind":"ImagePulledRecord","apiVersion":"kubelet.config.k8s.io/v1alpha1","lastUpdatedTime":"2024-10-21T12:26:40Z","imageRef":"testbrokenrecord":"credentialMapping":{"docker.io/testing/broken":{"kubernetesSecrets":[{"uid":"testsecretuid","namespace":"default","name":"pull-secret","credentialHash":"testsecrethash"}]}}"#;
const INTENT: &str = r#"{"kind":"ImagePullIntent","apiVersion":"kubelet.config.k8s.io/v1beta1","image":"secretorg/myimage:customtag"}"#;

/// A kubelet's directory.
struct Kubelet(tempfile::TempDir);

impl Kubelet {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        for name in ["pulled", "pulling"] {
            fs::create_dir_all(directory.path().join("image_manager").join(name)).unwrap();
        }
        Self(directory)
    }

    fn records(&self) -> Records {
        Records::new(self.0.path())
    }

    fn path(&self, id: &str) -> PathBuf {
        self.0.path().join("image_manager/pulled").join(file_name(id))
    }

    fn put(&self, id: &str, content: &str) {
        fs::write(self.path(id), content).unwrap();
    }

    /// The record of an image, with `{id}` in it.
    fn put_for(&self, id: &Digest, mapping: &str) {
        let record = format!(
            r#"{{"kind":"ImagePulledRecord","apiVersion":"kubelet.config.k8s.io/v1beta1","lastUpdatedTime":"2024-10-21T12:26:40Z","imageRef":"{id}","credentialMapping":{mapping}}}"#
        );
        self.put(id.as_str(), &record);
    }

    fn mapping(&self, id: &Digest) -> serde_json::Value {
        let record: serde_json::Value =
            serde_json::from_slice(&fs::read(self.path(id.as_str())).unwrap()).unwrap();
        assert_eq!(record["imageRef"], id.as_str());
        record.get("credentialMapping").cloned().unwrap_or_default()
    }
}

fn secret(namespace: &str, hash: &str) -> v1::PullSecret {
    let (uid, name) = (format!("uid-{namespace}"), "pull".to_owned());
    v1::PullSecret { uid, namespace: namespace.to_owned(), name, credential_hash: hash.to_owned() }
}

fn restriction(secrets: Vec<v1::PullSecret>) -> Restriction {
    let repository = v1::PulledRepository {
        repository: "r.test/a".to_owned(),
        secrets,
        ..v1::PulledRepository::default()
    };
    Restriction::parse(repository, &"r.test/a:1".parse().unwrap()).unwrap()
}

#[test]
fn file_names_are_kubelets() {
    let name = "sha256-b3c0cc4278800b03a308ceb2611161430df571ca733122f0a40ac8b9792a9064";
    assert_eq!(file_name("testimageref"), name);
}

#[test]
fn reads_what_kubelet_writes() {
    let wire = |text: &str| Record::parse(text.as_bytes()).unwrap().to_wire().repositories;
    let [repository] = &wire(SECRET)[..] else { panic!("one") };
    assert_eq!(repository.repository, "docker.io/testing/test");
    assert!(!repository.every_pod);
    let secret = &repository.secrets[0];
    assert_eq!((secret.uid.as_str(), secret.namespace.as_str()), ("testsecretuid", "default"));
    assert_eq!((secret.name.as_str(), secret.credential_hash.as_str()), ("pull-secret", "testsecrethash"));
    let account = &wire(ACCOUNT)[0].service_accounts[0];
    assert_eq!((account.uid.as_str(), account.name.as_str()), ("test-sa-uid", "test-sa"));
    assert!(wire(EVERYBODY)[0].every_pod);
    assert_eq!(wire(NOBODY), []);
    let bytes = Record::parse(ACCOUNT.as_bytes()).unwrap().to_bytes().unwrap();
    assert_eq!(bytes, ACCOUNT.as_bytes(), "written as kubelet writes it");
    assert_eq!(parse_intent(INTENT.as_bytes()).unwrap(), "secretorg/myimage:customtag");
}

#[test]
fn takes_nothing_that_kubelet_would_not() {
    for (from, to) in [
        ("v1beta1", "v1"),
        ("ImagePulledRecord", "ImagePullIntent"),
        ("\"imageRef\"", "\"imageref\""),
        ("\"uid\"", "\"more\":1,\"uid\""),
        ("\"credentialHash\":\"testsecrethash\"", "\"credentialHash\":7"),
    ] {
        let changed = SECRET.replace(from, to);
        assert_ne!(changed, SECRET);
        assert!(Record::parse(changed.as_bytes()).is_err(), "{changed}");
    }
    assert!(Record::parse(BROKEN.as_bytes()).is_err());
    assert!(parse_intent(SECRET.as_bytes()).is_err());
}

#[test]
fn what_cannot_be_read_names_nobody() {
    let kubelet = Kubelet::new();
    let id = |n: u8| Digest::sha256(&[n]);
    kubelet.put(id(1).as_str(), BROKEN);
    kubelet.put(id(2).as_str(), SECRET); // of another image
    kubelet.put(id(3).as_str(), &" ".repeat(1 + usize::try_from(MAX_FILE).unwrap()));
    kubelet.put_for(&id(4), r#"{"r.test/a":{"nodePodsAccessible":true}}"#);
    fs::write(kubelet.path(id(5).as_str()).with_extension("tmp"), BROKEN).unwrap();
    let secret = r#"{"uid":"u","namespace":"n","name":"pull-secret-of-a-tenant","credentialHash":"h"}"#;
    let secrets: Vec<String> = (0..100).map(|n| secret.replace("tenant", &n.to_string())).collect();
    let names: Vec<String> = (0..20)
        .map(|n| format!(r#""r.test/name-{n}":{{"kubernetesSecrets":[{}]}}"#, secrets.join(",")))
        .collect();
    kubelet.put_for(&id(7), &format!("{{{}}}", names.join(",")));
    let pulls = kubelet.records().read();
    for n in 1..=3 {
        assert_eq!(pulls.of(&id(n)), Some(PulledRecord::default()), "{n}");
    }
    assert!(pulls.of(&id(4)).unwrap().repositories[0].every_pod);
    assert_eq!(pulls.of(&id(5)), None, "one that is being written");
    assert_eq!(pulls.of(&id(6)), None);
    assert_eq!(pulls.of(&id(7)), Some(PulledRecord::default()), "one that is too large to be told");
}

#[test]
fn a_directory_that_cannot_be_read_lets_nobody_have_anything() {
    let kubelet = Kubelet::new();
    let directory = kubelet.0.path().join("image_manager/pulled");
    fs::remove_dir(&directory).unwrap();
    let records = kubelet.records();
    assert_eq!((records.kept(), records.read().of(&Digest::sha256(b"x"))), (PullRecords::None, None));
    fs::write(&directory, "no directory").unwrap();
    assert_eq!(records.kept(), PullRecords::Kept);
    assert_eq!(records.read().of(&Digest::sha256(b"x")), Some(PulledRecord::default()));
}

#[test]
fn knows_what_is_being_pulled() {
    let kubelet = Kubelet::new();
    let intents = kubelet.0.path().join("image_manager/pulling");
    fs::write(intents.join(file_name("secretorg/myimage:customtag")), INTENT).unwrap();
    let pulls = kubelet.records().read();
    assert!(pulls.is_pulling(&["docker.io/secretorg/myimage:customtag".to_owned()]));
    assert!(!pulls.is_pulling(&["docker.io/secretorg/myimage:other".to_owned()]));
}

#[tokio::test]
async fn notices_a_new_record() {
    let kubelet = Kubelet::new();
    let (records, id) = (kubelet.records(), Digest::sha256(b"x"));
    assert_eq!(records.read().of(&id), None);
    while tokio::time::timeout(POLL * 2, records.changed()).await.is_ok() {
        records.read(); // Until it may be relied on.
    }
    kubelet.put_for(&id, "{}");
    tokio::time::timeout(Duration::from_secs(10), records.changed()).await.unwrap();
    assert_eq!(records.read().of(&id), Some(PulledRecord::default()));
}

#[test]
fn writes_a_record_that_was_not_there() {
    let (kubelet, id) = (Kubelet::new(), Digest::sha256(b"x"));
    kubelet.records().restrict(&id, &restriction(vec![secret("shop", "h")])).unwrap();
    let expected = serde_json::json!({"r.test/a": {"kubernetesSecrets":
        [{"uid": "uid-shop", "namespace": "shop", "name": "pull", "credentialHash": "h"}]}});
    assert_eq!(kubelet.mapping(&id), expected);
    let path = kubelet.path(id.as_str());
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "nothing else is left");
    let before = fs::read(&path).unwrap();
    kubelet.records().restrict(&id, &restriction(vec![secret("shop", "other")])).unwrap();
    assert_eq!(fs::read(&path).unwrap(), before, "who stands in it stays as it is");
}

#[test]
fn one_that_names_nobody_is_a_record() {
    let (kubelet, id) = (Kubelet::new(), Digest::sha256(b"x"));
    kubelet.records().restrict(&id, &restriction(vec![])).unwrap();
    assert_eq!(kubelet.records().read().of(&id), Some(PulledRecord::default()));
}

#[test]
fn adds_to_a_record_and_takes_nothing_from_it() {
    let who = |namespace: &str| serde_json::json!({"uid": format!("uid-{namespace}"), "namespace": namespace, "name": "pull", "credentialHash": "h"});
    let cases = [
        // (what stands, what is there then)
        ("{}", serde_json::json!({"r.test/a": {"kubernetesSecrets": [who("shop")]}})),
        (
            r#"{"r.test/a":{"nodePodsAccessible":true}}"#,
            serde_json::json!({"r.test/a": {"nodePodsAccessible": true}}),
        ),
        (
            r#"{"r.test/b":{"nodePodsAccessible":true}}"#,
            serde_json::json!({"r.test/b": {"nodePodsAccessible": true}, "r.test/a": {"kubernetesSecrets": [who("shop")]}}),
        ),
        (
            r#"{"r.test/a":{"kubernetesSecrets":[{"uid":"uid-work","namespace":"work","name":"pull","credentialHash":"h"}]}}"#,
            serde_json::json!({"r.test/a": {"kubernetesSecrets": [who("shop"), who("work")]}}),
        ),
    ];
    for (stands, then) in cases {
        let (kubelet, id) = (Kubelet::new(), Digest::sha256(b"x"));
        kubelet.put_for(&id, stands);
        kubelet.records().restrict(&id, &restriction(vec![secret("shop", "h")])).unwrap();
        assert_eq!(kubelet.mapping(&id), then, "{stands}");
    }
}

#[test]
fn fails_where_it_cannot_write() {
    let id = Digest::sha256(b"x");
    let restriction = restriction(vec![secret("shop", "h")]);
    let says = |kubelet: &Kubelet| kubelet.records().restrict(&id, &restriction).unwrap_err().to_string();
    let kubelet = Kubelet::new();
    kubelet.put(id.as_str(), BROKEN);
    assert!(says(&kubelet).contains("cannot be added to"), "{}", says(&kubelet));
    assert_eq!(fs::read_to_string(kubelet.path(id.as_str())).unwrap(), BROKEN);
    let kubelet = Kubelet::new();
    kubelet.put(id.as_str(), SECRET);
    assert!(says(&kubelet).contains("it is about testimageref"), "{}", says(&kubelet));
    fs::remove_dir_all(kubelet.0.path().join("image_manager")).unwrap();
    assert!(says(&kubelet).contains("keeps no records"), "{}", says(&kubelet));
}

#[test]
fn refuses_what_is_no_restriction() {
    let parse = |wire: v1::PulledRepository| Restriction::parse(wire, &"nginx:1".parse().unwrap());
    let of = |repository: &str| v1::PulledRepository {
        repository: repository.to_owned(),
        secrets: vec![secret("shop", "")],
        ..v1::PulledRepository::default()
    };
    for good in ["nginx", "docker.io/library/nginx"] {
        assert!(parse(of(good)).is_ok(), "{good}");
    }
    let nameless = v1::PullSecret::default();
    for (bad, field) in [
        (of("nginx2"), "pulled.repository"),
        (of("nginx:1"), "pulled.repository"),
        (of(""), "pulled.repository"),
        (v1::PulledRepository { every_pod: true, ..of("nginx") }, "pulled.every_pod"),
        (v1::PulledRepository { secrets: vec![nameless], ..of("nginx") }, "pulled"),
        (v1::PulledRepository { secrets: vec![secret("a", ""); 257], ..of("nginx") }, "pulled"),
    ] {
        assert_eq!(parse(bad).unwrap_err().0, field);
    }
}
