use super::*;

fn pod(reason: &str) -> PodView {
    PodView {
        namespace: "shop".into(),
        name: "web-0".into(),
        uid: "u".into(),
        annotations: [(names::AUTO_SALVAGE.to_owned(), "true".to_owned())].into(),
        node: "n1".into(),
        containers: vec![
            ContainerView {
                field_path: "spec.initContainers{init}".into(),
                image: "busybox".into(),
                pull_policy: "Always".into(),
                ..ContainerView::default()
            },
            ContainerView {
                field_path: "spec.containers{web}".into(),
                image: "r.test/web:v1".into(),
                pull_policy: "IfNotPresent".into(),
                waiting_reason: reason.into(),
                ..ContainerView::default()
            },
        ],
        ..PodView::default()
    }
}

#[test]
fn sees_the_reasons_of_a_missing_image_and_no_other() {
    for (reason, seen) in [
        ("ErrImagePull", true),
        ("ImagePullBackOff", true),
        ("ErrImageNeverPull", true),
        ("ImageInspectError", true),
        ("RegistryUnavailable", true),
        ("SignatureValidationFailed", true),
        ("InvalidImageName", true),
        ("CreateContainerError", false),
        ("CreateContainerConfigError", false),
        ("RunContainerError", false),
        ("ContainerCreating", false),
        ("PodInitializing", false),
        ("CrashLoopBackOff", false),
        ("", false),
    ] {
        let found = waiting(&pod(reason));
        assert_eq!(found.is_some(), seen, "{reason}");
        if let Some(found) = found {
            assert_eq!(found.waits.len(), 1);
            assert_eq!(&*found.waits[0].image, "r.test/web:v1");
            assert!(!found.waits[0].policy_always);
            assert_eq!(found.says, Some(true));
        }
    }
}

#[test]
fn a_container_that_cannot_be_made_waits_for_its_image_only_if_that_is_what_ails_it() {
    for (message, seen) in [
        (
            "failed to create containerd container: error unpacking image: failed to extract layer sha256:59: failed to \
             get reader from content store: content digest sha256:06: not found",
            true,
        ),
        ("failed to get image from containerd \"sha256:ab\": image \"sha256:ab\": not found", true),
        (
            "failed to create containerd container: missing parent \"k8s.io/12/sha256:cd\" bucket: not found",
            true,
        ),
        ("failed to generate spec: failed to stat \"/srv/data\": no such file or directory", false),
        ("failed to reserve container name \"web_web-0\": name is reserved", false),
    ] {
        let mut pod = pod("CreateContainerError");
        pod.containers[1].waiting_message = message.into();
        let found = waiting(&pod);
        assert_eq!(found.is_some(), seen, "{message}");
        assert!(found.is_none_or(|found| &*found.waits[0].message == message));
    }
}

#[test]
fn sees_init_containers() {
    let mut pod = pod("PodInitializing");
    pod.containers[0].waiting_reason = "ErrImagePull".into();
    let found = waiting(&pod).unwrap();
    assert_eq!(found.waits[0].field_path, "spec.initContainers{init}");
    assert!(found.waits[0].policy_always);
}

#[test]
fn leaves_alone_what_is_unscheduled_or_going() {
    let mut unscheduled = pod("ErrImagePull");
    unscheduled.node.clear();
    assert_eq!(waiting(&unscheduled), None);
    let mut going = pod("ErrImagePull");
    going.terminating = true;
    assert_eq!(waiting(&going), None);
}

#[test]
fn a_message_is_bounded_and_what_a_pull_failed_of_is_remembered() {
    let mut failed = pod("ErrImagePull");
    failed.containers[1].waiting_message = "dial tcp 10.0.0.1:5000: connect: connection refused".into();
    let before = waiting(&failed).unwrap();
    assert_eq!(
        before.waits[0].last_pull_error.as_deref(),
        Some("dial tcp 10.0.0.1:5000: connect: connection refused")
    );
    let mut backing_off = pod("ImagePullBackOff");
    backing_off.containers[1].waiting_message = "Back-off pulling image \"r.test/web:v1\"".into();
    let first = || waiting(&backing_off).unwrap().waits.remove(0);
    assert_eq!((first().last_pull_error, first().class), (None, Class::CauseUnseen));
    let now = first().remembering(&before);
    assert_eq!((now.last_pull_error, now.class), (before.waits[0].last_pull_error.clone(), Class::Refused));
    let other = Wait { image: "r.test/web:v2".into(), ..first() }.remembering(&before);
    assert_eq!(other.last_pull_error, None, "another image");
    failed.containers[1].waiting_message = "x".repeat(100_000);
    assert_eq!(waiting(&failed).unwrap().waits[0].message.len(), MAX_MESSAGE);
}

#[test]
fn a_volumes_image_is_told_from_the_containers_own_by_the_message() {
    let mut pod = pod("ErrImagePull");
    for (name, image, policy) in [
        ("model", "r.test/model:v2", "Always"),
        ("words", "words", "Never"),
        ("else", "r.test/else:v1", "Never"),
    ] {
        pod.volumes.push(VolumeView { name: name.into(), image: image.into(), pull_policy: policy.into() });
    }
    pod.containers[1].mounts = ["config", "model", "words"].map(Into::into).into();
    // The texts of kubelet 1.36 and of containerd 2.4.
    for (reason, message, image, always) in [
        (
            "ImagePullBackOff",
            "Back-off pulling image \"r.test/model:v2\": ErrImagePull: x",
            "r.test/model:v2",
            true,
        ),
        (
            "ErrImagePull",
            "failed to pull and unpack image \"docker.io/library/words:latest\": failed to resolve reference \
             \"docker.io/library/words:latest\": not found",
            "words",
            false,
        ),
        (
            "ErrImageNeverPull",
            "Container image \"words\" is not present with pull policy of Never",
            "words",
            false,
        ),
        (
            "RegistryUnavailable",
            "image pull failed for r.test/model:v2 because the registry is unavailable: 503",
            "r.test/model:v2",
            true,
        ),
        ("ImagePullBackOff", "Back-off pulling image \"r.test/web:v1\"", "r.test/web:v1", false),
        ("ErrImagePull", "pull QPS exceeded", "r.test/web:v1", false),
        ("ImagePullBackOff", "Back-off pulling image \"r.test/else:v1\"", "r.test/web:v1", false),
    ] {
        pod.containers[1].waiting_reason = reason.into();
        pod.containers[1].waiting_message = message.into();
        let found = waiting(&pod).unwrap();
        assert_eq!(found.waits.len(), 1);
        let wait = &found.waits[0];
        assert_eq!((&*wait.image, wait.policy_always), (image, always), "{message}");
        assert_eq!(wait.reference, Ok(image.parse().unwrap()));
        assert_eq!(wait.field_path, "spec.containers{web}");
    }
}

#[test]
fn what_runs_is_known_by_a_repositorys_digest_alone() {
    let digest = Digest::sha256(b"x");
    for (id, known) in [
        (format!("r.test/web@{digest}"), true),
        (format!("docker-pullable://r.test/web@{digest}"), true),
        (format!("docker-pullable://@{digest}"), false),
        (format!("@{digest}"), false),
        (digest.to_string(), false),
        (format!("docker://{digest}"), false),
        (String::new(), false),
    ] {
        let mut pod = pod("");
        pod.controller = Some("rs".into());
        pod.containers[1].running_id.clone_from(&id);
        pod.containers[1].running_image = "r.test/web:v1".into();
        let expected = known.then(|| Runs {
            namespace: "shop".into(),
            controller: Some("rs".into()),
            images: vec![("r.test/web:v1".into(), digest.clone())],
        });
        assert_eq!(runs(&pod), expected, "{id}");
        // Spec was changed in place: what still runs is not what the new tag means.
        pod.containers[1].running_image = "r.test/web:v0".into();
        assert_eq!(runs(&pod), None, "{id}");
    }
}
