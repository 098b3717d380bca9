//! `SalvageJob`: one image wanted on one node, taken from the nodes that hold it.

#![allow(clippy::duplicated_attributes)] // every printer column has a type of its own

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Brings one image to one node from the nodes that hold it. It feels like a `batch/v1` Job: final once
/// Imported or Failed; trying again is a new `SalvageJob`.
#[derive(CustomResource, KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[kube(
    group = "tote.dev",
    version = "v1alpha1",
    kind = "SalvageJob",
    namespaced,
    shortname = "sj",
    category = "tote",
    status = "SalvageJobStatus",
    derive = "PartialEq",
    doc = "Brings one image to one node from the nodes that hold it, without a registry.",
    selectable = ".spec.nodeName",
    printcolumn(name = "Image", type_ = "string", json_path = ".spec.image"),
    printcolumn(name = "Node", type_ = "string", json_path = ".spec.nodeName"),
    printcolumn(name = "Phase", type_ = "string", json_path = ".status.phase"),
    printcolumn(name = "Source", type_ = "string", json_path = ".status.sourceNodes[0]"),
    printcolumn(
        name = "Size",
        type_ = "integer",
        description = "Bytes of the image for the node's platform",
        json_path = ".status.transfer.totalBytes"
    ),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(name = "Digest", type_ = "string", json_path = ".status.digest", priority = 1),
    printcolumn(
        name = "Reason",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Imported\")].reason",
        priority = 1
    )
)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.image == oldSelf.image && self.nodeName == oldSelf.nodeName \
        && has(self.digest) == has(oldSelf.digest) && (!has(self.digest) || self.digest == oldSelf.digest) \
        && has(self.sourceNodeName) == has(oldSelf.sourceNodeName) \
        && (!has(self.sourceNodeName) || self.sourceNodeName == oldSelf.sourceNodeName) \
        && has(self.backoffLimit) == has(oldSelf.backoffLimit) \
        && (!has(self.backoffLimit) || self.backoffLimit == oldSelf.backoffLimit) \
        && has(self.activeDeadlineSeconds) == has(oldSelf.activeDeadlineSeconds) \
        && (!has(self.activeDeadlineSeconds) || self.activeDeadlineSeconds == oldSelf.activeDeadlineSeconds) \
        && has(self.pendingDeadlineSeconds) == has(oldSelf.pendingDeadlineSeconds) \
        && (!has(self.pendingDeadlineSeconds) || self.pendingDeadlineSeconds == oldSelf.pendingDeadlineSeconds)")
        .message("spec is immutable but for suspend, priority and ttlSecondsAfterFinished: make a new SalvageJob instead"),
    validation = Rule::new("!has(self.digest) || !self.image.contains('@') || self.image.endsWith('@' + self.digest)")
        .message("digest differs from the one that image is pinned to: leave digest out, or make them agree")
)]
pub struct SalvageJobSpec {
    /// The image as a pod writes it: `nginx`, `registry.example/app:v1`, `registry.example/app@sha256:...`.
    /// It is the name that the image bears on the node afterwards.
    #[schemars(length(min = 1, max = 1024))]
    #[x_kube(validation = Rule::new("self.matches('^([a-zA-Z0-9.-]+(:[0-9]+)?/)?[a-z0-9]+([._-]+[a-z0-9]+)*\
        (/[a-z0-9]+([._-]+[a-z0-9]+)*)*(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?\
        (@(sha256:[a-f0-9]{64}|sha512:[a-f0-9]{128}))?$')")
        .message("image must be an image reference: [host[:port]/]path[:tag][@sha256:<64 lower-case hexadecimal digits>]"))]
    pub image: String,

    /// Digest of the index or manifest that `image` must mean. Without it a tag is resolved by what the nodes
    /// hold, if they agree; where they do not, as the controller is set up (its registry's answer, the newest, or not at all).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 135))]
    #[x_kube(validation = Rule::new("self.matches('^(sha256:[a-f0-9]{64}|sha512:[a-f0-9]{128})$')")
        .message("digest must be sha256:<64 lower-case hexadecimal digits> or sha512:<128>"))]
    pub digest: Option<String>,

    /// The node that is to have the image.
    #[schemars(length(min = 1, max = 253))]
    #[x_kube(validation = Rule::new("self.matches('^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$')")
        .message("nodeName must be the name of a Node: lower-case letters, digits, '-' and '.'"))]
    pub node_name: String,

    /// The only node to take the image from. Without it, every node that holds it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    #[x_kube(validation = Rule::new("self.matches('^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$')")
        .message("sourceNodeName must be the name of a Node: lower-case letters, digits, '-' and '.'"))]
    pub source_node_name: Option<String>,

    /// Of the jobs that wait for a free slot the one with the highest priority goes first. Default 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub priority: Option<i32>,

    /// While true nothing is moved, and a transfer under way is cancelled. The clocks of both deadlines start
    /// again afterwards. Default false.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub suspend: Option<bool>,

    /// How many failed attempts are followed by another one. Default 6.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 100))]
    pub backoff_limit: Option<i32>,

    /// Seconds from the first Transferring until an unfinished job fails. Default 3600.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub active_deadline_seconds: Option<i64>,

    /// Seconds that the job may be Pending before it fails. Without it, for ever.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub pending_deadline_seconds: Option<i64>,

    /// Seconds after its end when the job is deleted. Without it, it is kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub ttl_seconds_after_finished: Option<i64>,
}

/// Where a job stands. Written by the controller alone.
#[derive(JsonSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SalvageJobStatus {
    /// `metadata.generation` that this status speaks of; -1 before the controller has seen the job.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,

    /// Pending: it waits, and the reason of condition Imported says for what. Transferring: blobs are moved, and
    /// layers unpacked (reason Unpacking). Imported (final): the image is on the node, complete. Failed (final): given up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<Phase>,

    /// Digest that the image was resolved to: an index or a manifest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,

    /// `metadata.uid` of the target Node; another Node of the same name is not the target.
    #[serde(default, rename = "nodeUID", skip_serializing_if = "Option::is_none")]
    pub node_uid: Option<String>,

    /// The nodes that bytes came from; before the first byte, those that were asked.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub source_nodes: Vec<String>,

    /// Attempts begun.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub attempts: i32,

    /// When the job began to wait, or went back to waiting; absent while suspended and while not Pending.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pending_time: Option<Time>,

    /// When the job was first Transferring; absent while suspended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start_time: Option<Time>,

    /// When the job became Imported or Failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub completion_time: Option<Time>,

    /// How far the transfer is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub transfer: Option<Transfer>,

    /// Names of pods that were woken, the first ten.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pods: Vec<String>,

    /// Resolved, Imported, and for kstatus Ready, Reconciling, Stalled.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
}

/// Phase of a job.
#[derive(JsonSchema, Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Phase {
    /// Queued, suspended, or short of a node, a source or an agent: the reason of condition Imported says which.
    Pending,
    /// Blobs are being moved, verified, unpacked, or the next attempt is near.
    Transferring,
    /// The image is on the node, complete, and CRI answers for its name.
    Imported,
    /// Given up.
    Failed,
}

impl Phase {
    /// Whether no other phase follows.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Imported | Self::Failed)
    }
}

/// Bytes of a transfer, of the blobs as they are stored (compressed layers).
#[derive(JsonSchema, Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Transfer {
    /// Bytes of the image for the node's platform; 0 until known.
    #[serde(default)]
    pub total_bytes: i64,
    /// Bytes that came from other nodes.
    #[serde(default)]
    pub transferred_bytes: i64,
    /// Bytes that were on the node before.
    #[serde(default)]
    pub reused_bytes: i64,
}

#[allow(clippy::trivially_copy_pass_by_ref)] // serde hands over a reference
fn is_zero(n: &i32) -> bool {
    *n == 0
}
