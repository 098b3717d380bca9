//! Well-known names. All of them are API: changing one breaks somebody's alert or manifest.

/// On a Namespace: `"true"` lets salvage act in it.
pub const ALLOW: &str = "tote.dev/allow";
/// On a Pod, or on what controls it (a `ReplicaSet`, Deployment, `StatefulSet`, `DaemonSet`, Job, `CronJob` or
/// `ReplicationController`): `"true"` lets detection act on it, anything else does not; the nearest to the pod counts.
pub const AUTO_SALVAGE: &str = "tote.dev/auto-salvage";
/// On a Pod, by the controller: digest of the image that was salvaged for it.
pub const SALVAGED_DIGEST: &str = "tote.dev/salvaged-digest";
/// On a Pod, by the controller: when that import was complete, RFC 3339.
pub const IMPORTED_AT: &str = "tote.dev/imported-at";
/// On a Pod, by the controller: changed to make kubelet look at the pod again.
pub const WAKE: &str = "tote.dev/wake";

/// Label on a `SalvageJob` made by detection, with the value [`MANAGER`]. Such a job goes away by itself.
pub const MANAGED_BY: &str = "app.kubernetes.io/managed-by";
/// Name of the controller: field manager, event reporter, value of [`MANAGED_BY`].
pub const MANAGER: &str = "tote-controller";

/// Namespaces in which nothing is ever salvaged, whatever their annotations say.
pub const DENIED_NAMESPACES: [&str; 3] = ["kube-system", "kube-public", "kube-node-lease"];

/// Reasons of events on pods and, the last two, on nodes.
pub mod event {
    /// A pod waits for an image that other nodes hold.
    pub const IMAGE_SALVAGEABLE: &str = "ImageSalvageable";
    /// A pod waits for an image and salvage cannot help; the note says why.
    pub const IMAGE_NOT_ACTIONABLE: &str = "ImageNotActionable";
    /// A pod waits for an image that its registry knows and no node holds.
    pub const IMAGE_RESOLVED_UNCACHED: &str = "ImageResolvedUncached";
    /// The image a pod waited for is on its node now.
    pub const IMAGE_SALVAGED: &str = "ImageSalvaged";
    /// The image that a pod waits for stands on its node, but blobs of it are missing.
    pub const IMAGE_CORRUPT: &str = "ImageCorrupt";
    /// The `SalvageJob` for a pod failed.
    pub const IMAGE_SALVAGE_FAILED: &str = "ImageSalvageFailed";
    /// A node cannot start any pod, for it lacks the image of the sandbox and cannot pull it.
    pub const SANDBOX_IMAGE_MISSING: &str = "SandboxImageMissing";
    /// A node's container runtime does not answer.
    pub const RUNTIME_DOWN: &str = "RuntimeDown";
}

/// Types of conditions of a `SalvageJob`.
pub mod condition {
    /// Whether the image is resolved to a digest.
    pub const RESOLVED: &str = "Resolved";
    /// Whether the image is on the node, under the name asked for, as CRI sees it.
    pub const IMPORTED: &str = "Imported";
    /// Whether the namespace is known to be one that may have the image; Unknown where kubelets have no record of it.
    pub const ACCESS_PROVEN: &str = "AccessProven";
    /// As Imported, for tools that read kstatus.
    pub const READY: &str = "Ready";
    /// Whether the job is still being worked at (kstatus).
    pub const RECONCILING: &str = "Reconciling";
    /// Whether the job has failed for good (kstatus).
    pub const STALLED: &str = "Stalled";
}
