//! What the operator asked of the API server, from the audit log. Knows nothing of what was to be done.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::Path;

use anyhow::{Context as _, Result};
use serde::Deserialize;

/// The user that the controller is.
pub const CONTROLLER: &str = "system:serviceaccount:tote-system:tote";

/// What the controller asks for as long as it leads, whatever happens: the Lease, its certificate authority and who owns that,
/// which pods its agents are. By resource.
const UPKEEP: [&str; 5] = ["leases", "secrets", "configmaps", "deployments", "tokenreviews"];

/// The fields of `audit.k8s.io/v1` Event that are read.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Line {
    #[serde(rename = "auditID")]
    id: String,
    verb: String,
    object_ref: Option<ObjectRef>,
    response_status: Option<ResponseStatus>,
}

#[derive(Debug, Default, Deserialize)]
struct ObjectRef {
    #[serde(default)]
    resource: String,
    #[serde(default)]
    subresource: String,
    #[serde(default)]
    name: String,
}

#[derive(Debug, Deserialize)]
struct ResponseStatus {
    #[serde(default)]
    code: u16,
}

/// Requests of a span of time.
#[derive(Clone, Debug, Default)]
pub struct Requests {
    /// For salvage, by what was asked, such as `patch salvagejobs/status`.
    pub salvage: BTreeMap<String, usize>,
    /// What is asked for all the time.
    pub upkeep: BTreeMap<String, usize>,
    /// Those that were refused or failed, by what was asked and the status code.
    pub failed: BTreeMap<(String, u16), usize>,
    /// Writes of status by the job's name.
    pub status_writes: BTreeMap<String, usize>,
}

impl Requests {
    /// How many there were for salvage.
    pub fn total(&self) -> usize {
        self.salvage.values().sum()
    }

    /// Those that should not have been made; not those that a busy API server did not get to.
    pub fn refused(&self) -> Vec<&(String, u16)> {
        self.failed.keys().filter(|(_, code)| (400..500).contains(code) && *code != 429).collect()
    }

    /// How many of one kind there were, such as `create events`.
    pub fn of(&self, what: &str) -> usize {
        self.salvage.get(what).copied().unwrap_or(0)
    }

    fn of_lines(text: &str) -> Result<Self> {
        let mut requests = Self::default();
        let mut seen = std::collections::HashSet::new();
        for line in text.lines() {
            let line: Line = serde_json::from_str(line).with_context(|| format!("no audit event: {line}"))?;
            if !seen.insert(line.id) {
                continue; // A watch is told when it begins and when it ends.
            }
            let object = line.object_ref.unwrap_or_default();
            let slash = if object.subresource.is_empty() { "" } else { "/" };
            let what = format!("{} {}{slash}{}", line.verb, object.resource, object.subresource);
            if what == "patch salvagejobs/status" {
                *requests.status_writes.entry(object.name).or_default() += 1;
            }
            if let Some(status) = line.response_status.filter(|status| status.code >= 400) {
                *requests.failed.entry((what.clone(), status.code)).or_default() += 1;
            }
            let upkeep = UPKEEP.contains(&object.resource.as_str()) || object.resource.is_empty();
            let group = if upkeep { &mut requests.upkeep } else { &mut requests.salvage };
            *group.entry(what).or_default() += 1;
        }
        Ok(requests)
    }
}

/// The log from now on.
pub struct Mark(u64);

impl Mark {
    /// # Errors
    /// The log cannot be read.
    pub fn now(log: &Path) -> Result<Self> {
        Ok(Self(std::fs::metadata(log).with_context(|| format!("reading {}", log.display()))?.len()))
    }

    /// What was answered since.
    ///
    /// # Errors
    /// The log cannot be read, or holds something else than audit events.
    pub fn since(&self, log: &Path) -> Result<Requests> {
        let mut file = File::open(log).with_context(|| format!("opening {}", log.display()))?;
        file.seek(SeekFrom::Start(self.0))?;
        let mut text = String::new();
        file.read_to_string(&mut text)?;
        // The last line may be one that is being written.
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        Requests::of_lines(whole)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_counted_once_each_and_upkeep_apart() {
        let line = |id: &str, stage: &str, verb: &str, resource: &str, sub: &str, code: u16| {
            let object = serde_json::json!({"resource": resource, "subresource": sub, "name": "job-1"});
            let event = serde_json::json!({"auditID": id, "stage": stage, "verb": verb, "objectRef": object,
                "responseStatus": {"code": code}});
            event.to_string()
        };
        let text = [
            line("a", "ResponseStarted", "watch", "pods", "", 200),
            line("a", "ResponseComplete", "watch", "pods", "", 200),
            line("b", "ResponseComplete", "patch", "salvagejobs", "status", 200),
            line("c", "ResponseComplete", "patch", "salvagejobs", "status", 409),
            line("d", "ResponseComplete", "update", "leases", "", 200),
        ]
        .join("\n");
        let requests = Requests::of_lines(&text).unwrap();
        assert_eq!((requests.total(), requests.of("watch pods")), (3, 1));
        assert_eq!(requests.status_writes, [("job-1".to_owned(), 2)].into());
        assert_eq!(requests.failed, [(("patch salvagejobs/status".to_owned(), 409), 1)].into());
        assert_eq!(requests.upkeep, [("update leases".to_owned(), 1)].into());
        assert!(Requests::of_lines("{").is_err());
    }
}
