//! What happens to the controller.

use std::collections::HashSet;
use std::sync::Arc;

use jiff::Timestamp;
use tote_api::SalvageJob;
use tote_image::Digest;

use super::Question;
use crate::detect::{Consent, WaitingPod};
use crate::fleet::{FleetEvent, NodeName};
use crate::nodes::NodeFacts;
use crate::owners::{Owner, OwnerKind};
use crate::running::Runs;
use crate::salvage::Progress;

/// What is watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Kind {
    Pods,
    Namespaces,
    Nodes,
    Jobs,
    PullSecrets,
    Owners(OwnerKind),
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 12] = {
        let mut all = [Self::Pods; 12];
        (all[1], all[2], all[3], all[4]) = (Self::Namespaces, Self::Nodes, Self::Jobs, Self::PullSecrets);
        let mut n = 0;
        while n < OwnerKind::ALL.len() {
            all[5 + n] = Self::Owners(OwnerKind::ALL[n]);
            n += 1;
        }
        all
    };
}

/// Something that happened.
#[derive(Debug)]
pub enum Event {
    /// A pod was seen; `None` if it waits for no image or is gone.
    Pod {
        /// Its UID.
        uid: Arc<str>,
        /// What it waits for.
        waiting: Option<WaitingPod>,
    },
    /// A pod was seen, or is gone: what it runs.
    Runs {
        /// Its UID.
        uid: Arc<str>,
        /// What; `None` for nothing.
        runs: Option<Box<Runs>>,
    },
    /// An object that may control pods was seen, or is gone.
    Owner {
        /// Its UID.
        uid: Arc<str>,
        /// What it is; `None` if it is gone.
        owner: Option<Owner>,
    },
    /// A namespace was seen, or is gone.
    Namespace {
        /// Its name.
        name: Arc<str>,
        /// What it says; `None` if it is gone.
        consent: Option<Consent>,
    },
    /// A node was seen, or is gone.
    Node {
        /// Its name.
        name: NodeName,
        /// What it says; `None` if it is gone.
        facts: Option<NodeFacts>,
    },
    /// A pod got no sandbox, because its node lacks the image of it.
    SandboxFailed {
        /// The node.
        node: NodeName,
        /// The image.
        image: Arc<str>,
        /// When kubelet last said so.
        at: Timestamp,
    },
    /// The watch tells of a job.
    Job(Box<SalvageJob>),
    /// A call was answered with a job, of which the watch may not have told yet.
    JobAnswered(Box<SalvageJob>),
    /// A job is gone.
    JobGone {
        /// Its UID.
        uid: Arc<str>,
    },
    /// A watch has told all there is: UIDs of pods, jobs and owners, names of namespaces and nodes.
    Listed(Kind, HashSet<Arc<str>>),
    /// A watch cannot tell all there is, and is to be done without for now.
    Unlisted(Kind),
    /// A session tells something.
    Fleet(FleetEvent),
    /// A transfer tells something.
    Transfer {
        /// The job's UID.
        uid: Arc<str>,
        /// The stream it comes from.
        stream: u64,
        /// What.
        event: TransferEvent,
    },
    /// A job was asked for.
    Created {
        /// Its name without the counter.
        base: String,
        /// What the API server said.
        answer: CreateAnswer,
    },
    /// Kubelet says that a pull secret of a pod is missing.
    SecretMissing {
        /// The namespace it says so in.
        namespace: Arc<str>,
        /// The pod's UID.
        uid: Arc<str>,
        /// When it said so last.
        at: Timestamp,
    },
    /// A registry was asked.
    LookedUp {
        /// For what.
        question: Box<Question>,
        /// What it said.
        answer: LookupAnswer,
    },
    /// A status was written, or not.
    StatusWritten {
        /// The job's UID.
        uid: Arc<str>,
        /// The resource version that has it; `None` if it could not be written.
        version: Option<u64>,
    },
    /// A job could not be deleted.
    DeleteFailed {
        /// The job's UID.
        uid: Arc<str>,
    },
}

/// What came of asking for a job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CreateAnswer {
    /// There is one, and it was told of before.
    Made,
    /// A job that was told of before has this counter: perhaps one for something else.
    Taken(u32),
    /// There is none; why.
    Refused(String),
}

/// What came of asking a registry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LookupAnswer {
    /// The reference means this.
    Is(Digest),
    /// The registry answers that it has no such image; its words, for a person.
    Absent(String),
    /// It gave no answer, or was not to be asked; why.
    Failed(String),
}

/// What a transfer tells.
#[derive(Clone, Debug)]
pub enum TransferEvent {
    /// How far it is.
    Progress(Progress),
    /// The image is on the node and CRI answers for it.
    Done(Progress),
    /// The agent gave up.
    Failed {
        /// CamelCase.
        reason: &'static str,
        /// For a person.
        message: String,
        /// Whether another attempt may succeed.
        retryable: bool,
        /// Nodes that gave bytes that are not what was asked for.
        lying_nodes: Vec<String>,
    },
    /// The stream broke, or could not be opened: the transfer may be running nevertheless.
    Lost {
        /// Why.
        message: String,
    },
}
