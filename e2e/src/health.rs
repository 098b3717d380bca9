//! How an object reads to GitOps tools, by their own code: see `e2e/upstream/health`. Knows no kind of object.

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::{host, tools};

/// What is made of an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Of kstatus: `InProgress`, `Current`, `Failed`, `Terminating`. Of Argo CD: `Progressing`, `Healthy`, `Degraded`, `Suspended`.
    pub status: String,
    /// For a person.
    pub message: String,
}

/// Asks kstatus, or, given a file in Lua, what Argo CD makes of the object by that health check.
///
/// # Errors
/// The program has not been built, or takes the object or the check for broken.
pub fn judge(object: &Value, check: Option<&Path>) -> Result<Verdict> {
    let mut command = Command::new(tools::health()?);
    if let Some(check) = check {
        command.arg("-lua").arg(check);
    }
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    child.stdin.take().context("health has no standard input")?.write_all(object.to_string().as_bytes())?;
    let output = child.wait_with_output()?;
    host::finished(&command, &output)?;
    let said = String::from_utf8(output.stdout)?;
    let (status, message) = said.split_once('\n').with_context(|| format!("health says only {said:?}"))?;
    Ok(Verdict { status: status.to_owned(), message: message.trim_end().to_owned() })
}
