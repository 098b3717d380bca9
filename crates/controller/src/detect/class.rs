//! Why an image could not be had: the classes of failure, what each asks of a person, and whether a copy answers it.
//! Pure, and data throughout: [`rules`] says which messages belong to a class.
//!
//! Must not know pods, nodes or who holds an image.

mod rules;
#[cfg(test)]
mod tests;

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

/// Whether a failure of a class is answered with a copy from another node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stance {
    /// Yes, unless the cluster's policy excludes the class.
    Salvage,
    /// Not unless the cluster's policy names the class: the failure may be somebody's will, or a copy would do harm.
    Policy,
    /// Never, and no policy can change it: a copy cannot help, or nobody can consent to it.
    Never,
}

/// A string that is no class's name.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{name:?} is no class of pull failures; the classes are {}", names())]
pub struct UnknownClass {
    name: String,
}

fn names() -> String {
    Class::ALL.map(Class::name).join(", ")
}

macro_rules! classes {
    ($( $(#[$doc:meta])* $class:ident, $stance:ident, $remedy:literal; )*) => {
        /// Why an image could not be had. The name is what flags, events and metrics' labels bear.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Class {
            $( $(#[$doc])* $class, )*
        }

        impl Class {
            /// Every class.
            pub const ALL: [Self; [$( stringify!($class) ),*].len()] = [$( Self::$class ),*];

            /// Its name, such as `RateLimited`.
            pub const fn name(self) -> &'static str {
                match self { $( Self::$class => stringify!($class), )* }
            }

            /// Whether a copy is the answer, as long as no policy says otherwise.
            pub const fn stance(self) -> Stance {
                match self { $( Self::$class => Stance::$stance, )* }
            }

            /// What a person is to do: a sentence without a full stop.
            pub const fn remedy(self) -> &'static str {
                match self { $( Self::$class => $remedy, )* }
            }
        }
    };
}

classes! {
    /// What the pod names is no image reference.
    InvalidReference, Never,
        "correct the image's name in the pod's spec: it is not a valid reference";
    /// The node lacks the image, and the pod forbids pulling it.
    NeverPolicy, Salvage,
        "load the image onto the node, or set imagePullPolicy to IfNotPresent";
    /// A pull secret that the pod names is not there.
    SecretMissing, Policy,
        "create the pull secret in the pod's own namespace, or correct its name in imagePullSecrets";
    /// The registry asks who is there, and there was nothing to show.
    NoCredentials, Policy,
        "check the image's name; if the repository is private, add a pull secret for its registry to the pod or its \
         service account";
    /// The registry does not accept the credentials (containerd 1.6 says the same if there are none).
    BadCredentials, Policy,
        "check the pull secret: it is missing, its password is wrong, or its token has expired (those of cloud \
         registries last hours)";
    /// The registry knows who asks, and says no.
    Denied, Policy,
        "grant the account the right to pull from the repository, and check the registry's quota and its list of \
         allowed addresses";
    /// The registry has no such repository, tag or digest.
    NotFound, Salvage,
        "check the image's name and tag; if the registry has lost it, push it again";
    /// The registry has the manifest, but not everything that it names.
    BlobMissing, Salvage,
        "push the image again: the registry has lost a part of it";
    /// The image is not made for the node's platform.
    WrongPlatform, Policy,
        "build the image for the node's architecture too, or keep the pod on nodes of the image's architecture with a \
         nodeSelector";
    /// A media type that the node's containerd has given up.
    OldFormat, Policy,
        "build the image again and push it in the OCI or Docker schema 2 format";
    /// The registry, or one on the way, has had too many requests.
    RateLimited, Salvage,
        "authenticate to the registry, put a mirror before it, and set imagePullPolicy to IfNotPresent";
    /// kubelet itself refuses to pull so often.
    KubeletThrottle, Salvage,
        "raise registryPullQPS and registryBurst in the kubelet's configuration";
    /// The registry answers with an error of its own.
    RegistryUnavailable, Salvage,
        "check the registry's health";
    /// The node cannot resolve the registry's name.
    Dns, Salvage,
        "check the resolver of the node itself (a pod's DNS is another one), and the registry's name";
    /// Nobody listens there, or no way leads there.
    Refused, Salvage,
        "check the registry's address and port, the node's routes and the firewall between them (a NetworkPolicy does \
         not normally govern what a node pulls)";
    /// There is no answer.
    Timeout, Salvage,
        "check the node's way out: firewall, NAT and MTU";
    /// The pull was given up for it made no progress.
    Stalled, Salvage,
        "check the bandwidth to the registry; for very large layers raise containerd's image_pull_progress_timeout";
    /// The connection broke in the middle.
    CutOff, Salvage,
        "check the limits of size and time of proxies and load balancers before the registry";
    /// The node's proxy does not let it through.
    Proxy, Salvage,
        "check the proxy, and HTTPS_PROXY and NO_PROXY in the environment of containerd's service";
    /// The registry's certificate is not accepted.
    Tls, Salvage,
        "give containerd the registry's CA in certs.d, renew the certificate if it has expired, and check the node's \
         clock";
    /// Plain HTTP and HTTPS meet.
    Scheme, Salvage,
        "correct http:// or https:// for the registry in containerd's hosts.toml";
    /// A mirror stands in for the registry, and fails.
    Mirror, Salvage,
        "correct the registry's hosts.toml in containerd's certs.d, or repair the mirror that it names";
    /// A check of the image's signature has refused it.
    Signature, Policy,
        "sign the image, or correct the verification policy; a copy would go round it";
    /// The node's disk is full.
    Disk, Policy,
        "free or enlarge the file system of containerd on the node";
    /// The bytes that came are not those of the digest.
    CorruptTransfer, Salvage,
        "look for a proxy or cache before the registry that alters what passes, then let it be fetched again";
    /// A layer cannot be unpacked.
    Unpack, Salvage,
        "check the node's disk and snapshotter; if every node fails alike, the image itself is broken: build it again";
    /// containerd's records name what its store does not hold.
    CorruptStore, Salvage,
        "remove the image from the node (crictl rmi) and let it be fetched again; check the disk";
    /// The image that every pod's sandbox runs cannot be had. It is the node's, for which nobody can opt in.
    SandboxImage, Never,
        "load the sandbox (pause) image onto the node and pin it";
    /// containerd does not answer.
    RuntimeDown, Never,
        "restart containerd on the node and read its log";
    /// The pod waits, but not for an image.
    NotAPull, Never,
        "look at the pod's events: it is not an image that it waits for";
    /// Kubelet backs off and does not say why, and the last failure was not seen: so older kubelets do once this controller
    /// has begun anew. It may have been a refusal; kubelet's next attempt, within five minutes, tells.
    CauseUnseen, Policy,
        "wait for kubelet's next attempt to pull (at most 5 minutes), whose message says why it fails";
    /// A pull failed in words that no rule knows. The words are containerd's and registries' and change between
    /// versions; whoever opted in has asked that an image which a neighbour holds be copied when its pull fails, and
    /// an outage must not wait for a rule. What may be deliberate has its rules (the last of them take any wording of
    /// a refusal), and who may have the image is asked of every class.
    Unknown, Salvage,
        "read the message of the failed pull";
}

impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Class {
    type Err = UnknownClass;

    fn from_str(name: &str) -> Result<Self, UnknownClass> {
        let found = Self::ALL.into_iter().find(|class| class.name() == name);
        found.ok_or_else(|| UnknownClass { name: name.to_owned() })
    }
}

/// What is known of a failure.
#[derive(Clone, Copy, Debug, Default)]
pub struct Evidence<'a> {
    /// The container's waiting reason, or an event's reason.
    pub reason: &'a str,
    /// The message beside it.
    pub message: &'a str,
    /// The last message under `ErrImagePull`, for while they back off older kubelets do not repeat the cause
    pub last_pull_error: Option<&'a str>,
    /// The host of the image's registry, as [`tote_image::Reference::registry`] gives it.
    pub registry_host: Option<&'a str>,
}

/// Why the image could not be had.
pub fn classify(evidence: &Evidence<'_>) -> Class {
    let text = match evidence.last_pull_error {
        Some(cause) if forgetful(evidence.message) => cause,
        None if evidence.reason == "ImagePullBackOff" && forgetful(evidence.message) => {
            return Class::CauseUnseen;
        }
        _ => evidence.message,
    };
    let found = rules::RULES.iter().find(|rule| rule.matches(evidence.reason, text));
    let class = match found {
        Some(rule) => rule.class,
        None if rules::is_pull(evidence.reason, text) => Class::Unknown,
        None => Class::NotAPull,
    };
    if rules::UNREACHABLE.contains(&class) && evidence.registry_host.is_some_and(|host| elsewhere(text, host))
    {
        return Class::Mirror;
    }
    class
}

/// Whether a message is nothing but `Back-off pulling image "x"`, or nothing at all.
fn forgetful(message: &str) -> bool {
    let image = message.strip_prefix("Back-off pulling image \"").and_then(|rest| rest.strip_suffix('"'));
    message.is_empty() || image.is_some_and(|image| !image.contains('"'))
}

/// Whether the request that failed went to another host than the image's registry. Token servers and stores of blobs are
/// other hosts by right, so only paths of the registry's own API count.
fn elsewhere(text: &str, registry: &str) -> bool {
    let hosts = text.split("://").skip(1).filter_map(|url| {
        let (host, path) = url.split_once('/')?;
        path.starts_with("v2/").then_some(host)
    });
    hosts
        .last()
        .is_some_and(|host| host != registry && !(registry == "docker.io" && host.ends_with(".docker.io")))
}
