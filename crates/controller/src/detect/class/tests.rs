//! The rules on messages: those that were caused on real containerds, and those put together from the texts of kubelet,
//! containerd, CRI-O and registries that could not be.

use super::rules::RULES;
use super::*;

/// One failure.
#[derive(Debug)]
struct Sample {
    class: Class,
    reason: &'static str,
    host: Option<&'static str>,
    message: String,
}

/// `messages.txt`, as `e2e/tests/pull_failures` prints it.
fn caused() -> Vec<Sample> {
    let lines = include_str!("messages.txt").lines().filter(|line| !line.starts_with('#'));
    lines
        .map(|line| {
            let [_, _, class, reason, host, message] = line.splitn(6, " | ").collect::<Vec<_>>()[..] else {
                panic!("{line}")
            };
            let host = (host != "-").then_some(host);
            Sample { class: class.parse().unwrap(), reason, host, message: message.replace("\\n", "\n") }
        })
        .collect()
}

/// `sources.txt`.
fn read() -> Vec<Sample> {
    let lines = include_str!("sources.txt").lines().filter(|line| !line.starts_with('#'));
    let given = |text: &'static str| if text == "-" { "" } else { text };
    lines
        .map(|line| {
            let [class, reason, message] = line.splitn(3, " | ").collect::<Vec<_>>()[..] else {
                panic!("{line}")
            };
            let message = given(message).to_owned();
            Sample { class: class.parse().unwrap(), reason: given(reason), host: None, message }
        })
        .collect()
}

fn all() -> Vec<Sample> {
    caused().into_iter().chain(read()).collect()
}

fn evidence<'a>(reason: &'a str, message: &'a str) -> Evidence<'a> {
    Evidence { reason, message, last_pull_error: None, registry_host: None }
}

#[test]
fn classes_each_message() {
    let samples = all();
    assert!(samples.len() > 200, "{}", samples.len());
    for sample in samples {
        let evidence = Evidence { registry_host: sample.host, ..evidence(sample.reason, &sample.message) };
        assert_eq!(classify(&evidence), sample.class, "{sample:?}");
    }
}

/// As a pod shows a failed pull for most of the time, with kubelets that repeat the cause and with those that do not.
#[test]
fn classes_what_is_backed_off_from() {
    for sample in all().iter().filter(|sample| sample.reason == "ErrImagePull") {
        let back_off = "Back-off pulling image \"r.test/x:1\"";
        let message = format!("{back_off}: ErrImagePull: {}", sample.message);
        let new = Evidence { registry_host: sample.host, ..evidence("ImagePullBackOff", &message) };
        assert_eq!(classify(&new), sample.class, "{message}");
        let last_pull_error = Some(sample.message.as_str());
        let old = Evidence { last_pull_error, ..Evidence { message: back_off, ..new } };
        assert_eq!(classify(&old), sample.class, "{old:?}");
        let forgotten = Evidence { last_pull_error: None, ..old };
        assert_eq!(classify(&forgotten), Class::CauseUnseen);
        let stale = Evidence { last_pull_error: Some("pull QPS exceeded"), ..new };
        assert_eq!(classify(&stale), sample.class, "the present cause counts: {message}");
        // With several pull secrets kubelet tries each, and lists what came of it.
        let listed = format!("[{}, {}]", sample.message, sample.message);
        let listed = Evidence { message: &listed, ..new };
        assert_eq!(classify(&listed), sample.class, "{listed:?}");
    }
}

#[test]
fn every_rule_decides_something() {
    let samples = all();
    for rule in RULES {
        let decides = samples.iter().any(|sample| {
            let first = RULES.iter().find(|rule| rule.matches(sample.reason, &sample.message));
            first.is_some_and(|first| std::ptr::eq(first, rule))
        });
        assert!(decides, "no message needs {rule:?}");
    }
    let classes: std::collections::BTreeSet<Class> = samples.iter().map(|sample| sample.class).collect();
    // That nothing is said is no message.
    assert_eq!(classes.len() + 1, Class::ALL.len(), "{classes:?}");
}

/// Whoever names an image must not choose the class of its failure.
#[test]
fn no_rule_reads_an_image_s_name() {
    let nameable = |c: char| c.is_ascii_alphanumeric() || "._-/:@+".contains(c);
    for rule in RULES {
        for needle in rule.needles {
            assert!(!needle.chars().all(nameable), "{needle:?} can be a name");
        }
    }
    for name in ["shop/forbidden:403", "no-such-host/lookup:toomanyrequests", "denied/401:InvalidImageName"] {
        let message = format!("failed to resolve reference \"r.test/{name}\": something new");
        assert_eq!(classify(&evidence("ErrImagePull", &message)), Class::Unknown);
    }
}

#[test]
fn a_mirror_is_another_host_than_the_image_s() {
    let of = |host, url: &str, cause: &str| {
        let message = format!("failed to do request: Head \"{url}\": {cause}");
        classify(&Evidence { registry_host: Some(host), ..evidence("ErrImagePull", &message) })
    };
    let refused = "dial tcp 10.0.0.3:443: connect: connection refused";
    assert_eq!(of("r.test", "https://r.test/v2/x/manifests/1", refused), Class::Refused);
    assert_eq!(of("r.test", "https://mirror.test/v2/x/manifests/1?ns=r.test", refused), Class::Mirror);
    assert_eq!(of("docker.io", "https://registry-1.docker.io/v2/x/manifests/1", refused), Class::Refused);
    // Token servers and stores of blobs are elsewhere by right.
    assert_eq!(of("docker.io", "https://auth.docker.io/token?scope=a", refused), Class::Refused);
    assert_eq!(of("r.test", "https://blobs.test/sha256/1", refused), Class::Refused);
    // A mirror that refuses is no excuse.
    assert_eq!(
        of("r.test", "https://mirror.test/v2/x/manifests/1?ns=r.test", "403 Forbidden"),
        Class::Denied
    );
}

#[test]
fn what_may_be_deliberate_is_not_salvaged_unless_said() {
    let with =
        |stance| Class::ALL.into_iter().filter(move |class| class.stance() == stance).collect::<Vec<_>>();
    assert_eq!(
        with(Stance::Policy),
        [
            Class::SecretMissing,
            Class::NoCredentials,
            Class::BadCredentials,
            Class::Denied,
            Class::WrongPlatform,
            Class::OldFormat,
            Class::Signature,
            Class::Disk,
            Class::CauseUnseen
        ]
    );
    assert_eq!(
        with(Stance::Never),
        [Class::InvalidReference, Class::SandboxImage, Class::RuntimeDown, Class::NotAPull]
    );
}

#[test]
fn a_class_is_known_by_its_name_alone() {
    for class in Class::ALL {
        assert_eq!(class.name().parse(), Ok(class));
        assert!(!class.remedy().is_empty() && !class.remedy().ends_with('.'), "{class}");
    }
    let error = "ratelimited".parse::<Class>().unwrap_err().to_string();
    for part in ["\"ratelimited\"", "InvalidReference, ", "RateLimited", "Unknown"] {
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn the_documentation_tells_every_class() {
    let text = include_str!("../../../../../docs/failures.md");
    for class in Class::ALL {
        let copy = match class.stance() {
            Stance::Salvage => "salvaged",
            Stance::Policy => "if named",
            Stance::Never => "never",
        };
        let row = format!("| `{class}` | {copy} | {} |", class.remedy());
        assert!(text.lines().any(|line| line == row), "docs/failures.md lacks the row {row}");
    }
}
