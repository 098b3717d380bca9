//! The messages of each class: an ordered table, of which the first rule that matches decides.
//!
//! Order: what a person or a policy has decided, the node's own state, the image's form, then how far the request came: not
//! to the registry, an answer, a body. Text that only wraps another error comes last.

use super::Class;

/// Where a message was said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    /// Under this reason, whatever the message.
    Reason(&'static str),
    /// While an image was pulled.
    Pull,
    /// While a container was made or started of an image that was there.
    Create,
    /// Either.
    Any,
    /// While a pod's sandbox was made.
    Sandbox,
}

/// A message of a class: all of `needles` are in it.
#[derive(Debug)]
pub(super) struct Rule {
    pub(super) class: Class,
    at: At,
    /// None may be part of an image's name, which most messages hold: whoever names images could choose the class.
    pub(super) needles: &'static [&'static str],
}

impl Rule {
    pub(super) fn matches(&self, reason: &str, text: &str) -> bool {
        let here = match self.at {
            At::Reason(wanted) => reason == wanted,
            At::Pull => is_pull(reason, text),
            At::Create => CREATE.contains(&reason),
            At::Any => is_pull(reason, text) || CREATE.contains(&reason),
            At::Sandbox => reason == "FailedCreatePodSandBox",
        };
        here && self.needles.iter().all(|needle| text.contains(needle))
    }
}

/// Waiting reasons of kubelet's image manager (`pkg/kubelet/images/types.go`, `cri-api/pkg/errors`).
const PULL: [&str; 4] =
    ["ErrImagePull", "ImagePullBackOff", "RegistryUnavailable", "SignatureValidationFailed"];

/// Reasons under which kubelet reports what came of an image that it had.
const CREATE: [&str; 4] = ["CreateContainerError", "RunContainerError", "StartError", "ImageInspectError"];

/// Whether a failure is one of pulling. An event under `Failed` says so in its message.
pub(super) fn is_pull(reason: &str, text: &str) -> bool {
    PULL.contains(&reason) || (reason == "Failed" && text.starts_with("Failed to pull image \""))
}

/// Classes that say that a host was not reached or did not work: if it was not the registry's, it was a mirror.
pub(super) const UNREACHABLE: [Class; 7] = [
    Class::Dns,
    Class::Refused,
    Class::Timeout,
    Class::CutOff,
    Class::Tls,
    Class::Scheme,
    Class::RegistryUnavailable,
];

const fn reason(class: Class, reason: &'static str) -> Rule {
    Rule { class, at: At::Reason(reason), needles: &[] }
}

const fn pull(class: Class, needles: &'static [&'static str]) -> Rule {
    Rule { class, at: At::Pull, needles }
}

const fn create(class: Class, needles: &'static [&'static str]) -> Rule {
    Rule { class, at: At::Create, needles }
}

const fn any(class: Class, needles: &'static [&'static str]) -> Rule {
    Rule { class, at: At::Any, needles }
}

const fn sandbox(class: Class, needles: &'static [&'static str]) -> Rule {
    Rule { class, at: At::Sandbox, needles }
}

/// The first that matches decides.
pub(super) static RULES: &[Rule] = &[
    // Decided by a person or a policy.
    reason(Class::InvalidReference, "InvalidImageName"),
    reason(Class::NeverPolicy, "ErrImageNeverPull"),
    reason(Class::SecretMissing, "FailedToRetrieveImagePullSecret"),
    reason(Class::Signature, "SignatureValidationFailed"),
    pull(Class::Signature, &["because the signature validation failed"]),
    pull(Class::Signature, &["SignatureValidationFailed: "]),
    pull(Class::Signature, &["image verifier ", " blocked pull of "]),
    pull(Class::Signature, &["Source image rejected: "]),
    any(Class::InvalidReference, &["couldn't parse image "]),
    any(Class::InvalidReference, &["failed to parse image reference "]),
    any(Class::InvalidReference, &["short-name ", " did not resolve "]),
    pull(Class::KubeletThrottle, &["pull QPS exceeded"]),
    // The node itself.
    reason(Class::RuntimeDown, "NodeNotReady"),
    any(Class::RuntimeDown, &["dial unix ", "connect: "]),
    any(Class::RuntimeDown, &["code = Unavailable desc = error reading from server"]),
    any(Class::RuntimeDown, &["code = Unavailable desc = connection error"]),
    any(Class::Disk, &["no space left on device"]),
    reason(Class::Disk, "FreeDiskSpaceFailed"),
    reason(Class::Disk, "ImageGCFailed"),
    any(Class::CorruptStore, &[" expected at ", ": blob not found"]),
    any(Class::Unpack, &["failed to prepare extraction snapshot "]),
    any(Class::Unpack, &["failed to extract layer "]),
    any(Class::Unpack, &["wrong diff id "]),
    any(Class::Unpack, &["apply layer error for "]),
    // The image's form.
    any(Class::WrongPlatform, &["no match for platform in manifest"]),
    pull(Class::WrongPlatform, &["no image found in image index for architecture "]),
    create(Class::WrongPlatform, &["exec format error"]),
    pull(Class::OldFormat, &[" is no longer supported since containerd "]),
    pull(Class::OldFormat, &["schema 1 image manifests are no longer supported"]),
    // The way to the registry.
    pull(Class::Proxy, &["proxyconnect tcp: "]),
    pull(Class::Dns, &["no such host"]),
    pull(Class::Dns, &["server misbehaving"]),
    pull(Class::Dns, &["Temporary failure in name resolution"]),
    pull(Class::Dns, &[": lookup ", "i/o timeout"]),
    pull(Class::Dns, &[": lookup ", "connection refused"]),
    pull(Class::Dns, &[": lookup ", "network is unreachable"]),
    pull(Class::Refused, &["connect: connection refused"]),
    pull(Class::Refused, &["connect: no route to host"]),
    pull(Class::Refused, &["connect: network is unreachable"]),
    pull(Class::Scheme, &["server gave HTTP response to HTTPS client"]),
    pull(Class::Timeout, &["TLS handshake timeout"]),
    pull(Class::Tls, &["x509: "]),
    pull(Class::Tls, &[" tls: "]),
    // The registry's answer.
    pull(Class::RateLimited, &["429 Too Many Requests"]),
    pull(Class::RateLimited, &["toomanyrequests: "]),
    pull(Class::RateLimited, &["(Retry-After:"]),
    pull(Class::Denied, &["403 Forbidden"]),
    pull(Class::Denied, &["requested access to the resource is denied"]),
    pull(Class::RegistryUnavailable, &["unexpected status", ": 50"]),
    pull(Class::RegistryUnavailable, &["failed with status code [", "]: 50"]),
    pull(Class::NoCredentials, &["failed to fetch anonymous token: ", "401 Unauthorized"]),
    pull(Class::BadCredentials, &["failed to fetch oauth token: ", "401 Unauthorized"]),
    pull(Class::NoCredentials, &["no basic auth credentials"]),
    pull(
        Class::NoCredentials,
        &["pull access denied, repository does not exist or may require authorization"],
    ),
    pull(Class::BadCredentials, &["401 Unauthorized"]),
    pull(Class::BadCredentials, &["authorization failed"]),
    pull(Class::BadCredentials, &["invalid username/password"]),
    pull(Class::Mirror, &["no resolve hosts"]),
    pull(Class::BlobMissing, &["could not fetch content descriptor "]),
    pull(Class::BlobMissing, &["content at ", " not found"]),
    pull(Class::NotFound, &["failed to resolve reference \"", ": not found"]),
    pull(Class::NotFound, &["failed to resolve image: ", ": not found"]),
    pull(Class::NotFound, &["manifest unknown"]),
    pull(Class::NotFound, &["name unknown: "]),
    pull(Class::NotFound, &["repository name not known to registry"]),
    // The body, and what became of it.
    pull(Class::CorruptTransfer, &["unexpected commit digest "]),
    pull(Class::CorruptTransfer, &[" failed size validation: "]),
    pull(Class::CutOff, &["unexpected EOF"]),
    pull(Class::CutOff, &["connection reset by peer"]),
    pull(Class::CutOff, &["\": EOF"]),
    pull(Class::Stalled, &["because of no progress"]),
    pull(Class::Stalled, &["context canceled"]),
    pull(Class::Timeout, &["i/o timeout"]),
    pull(Class::Timeout, &["context deadline exceeded"]),
    pull(Class::Timeout, &["Client.Timeout exceeded "]),
    pull(Class::CorruptTransfer, &["failed commit on ref "]),
    // An image that the node believes to have.
    reason(Class::CorruptStore, "ImageInspectError"),
    create(Class::CorruptStore, &["failed to get image from containerd "]),
    create(Class::CorruptStore, &["content digest ", ": not found"]),
    create(Class::CorruptStore, &["failed to resolve rootfs"]),
    create(Class::CorruptStore, &["missing parent "]),
    sandbox(Class::SandboxImage, &["failed to get sandbox image "]),
    sandbox(Class::SandboxImage, &["failed to pull image "]),
    // Wrappers, and wordings of registries and other runtimes. A refusal in unknown words is a refusal.
    pull(Class::RegistryUnavailable, &["unexpected status"]),
    pull(Class::RegistryUnavailable, &["failed with status code ["]),
    pull(Class::CutOff, &["httpReadSeeker: failed open: "]),
    reason(Class::RegistryUnavailable, "RegistryUnavailable"),
    pull(Class::RegistryUnavailable, &["because the registry is unavailable"]),
    pull(Class::BadCredentials, &[" unauthorized"]),
    pull(Class::BadCredentials, &[" Unauthorized"]),
    pull(Class::Denied, &[" denied"]),
    pull(Class::Denied, &[" forbidden"]),
    pull(Class::Denied, &[" Forbidden"]),
];
