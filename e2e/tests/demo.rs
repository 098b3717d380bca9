//! The demo as a person runs it: interrupted, kept, run again, and when the pod is not rescued. Needs root, what
//! `e2e/tools.sh` builds, and the operator's image.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};
use tote_e2e::cluster::Cluster;
use tote_e2e::host;

/// The demo's cluster.
const CLUSTER: &str = "demo";

struct Demo {
    child: Child,
    said: BufReader<std::process::ChildStdout>,
    text: String,
}

impl Demo {
    fn start(arguments: &[&str], keep: bool) -> Result<Self> {
        let mut command = Command::new("env");
        // Who runs this in the background of a shell ignores SIGINT, and so would the demo.
        command.args(["--default-signal=INT", env!("CARGO_BIN_EXE_demo")]).args(arguments);
        command.env("KEEP", if keep { "1" } else { "" }).stdout(Stdio::piped());
        let mut child = command.spawn()?;
        let said = BufReader::new(child.stdout.take().context("no standard output")?);
        Ok(Self { child, said, text: String::new() })
    }

    /// Reads on until a line has `part`.
    fn until(&mut self, part: &str) -> Result<()> {
        loop {
            let mut line = String::new();
            ensure!(self.said.read_line(&mut line)? > 0, "it ended before it said {part:?}:\n{}", self.text);
            self.text.push_str(&line);
            if line.contains(part) {
                return Ok(());
            }
        }
    }

    /// Reads to the end.
    fn end(mut self) -> Result<(ExitStatus, String)> {
        while self.said.read_line(&mut self.text)? > 0 {}
        Ok((self.child.wait()?, self.text))
    }
}

fn is_up() -> bool {
    Cluster::attach(CLUSTER).is_ok()
}

/// One test, for the parts share the cluster's name.
#[test]
fn it_shows_the_rescue_and_leaves_nothing_unless_asked_to() -> Result<()> {
    let mut demo = Demo::start(&[], false)?;
    demo.until("the API server answers")?;
    kill_process(Pid::from_child(&demo.child), Signal::INT)?;
    let (status, text) = demo.end()?;
    ensure!(status.code() == Some(130) && !is_up(), "Ctrl-C: {status}\n{text}");

    let (status, text) = Demo::start(&[], true)?.end()?;
    ensure!(status.success() && is_up(), "KEEP=1: {status}\n{text}");
    let mut rest = text.as_str();
    for part in [
        "is stopped",
        ": ErrImagePull",
        "failed to pull and unpack image",
        " Pending\n",
        " Transferring\n",
        " Imported\n",
        " Running on ",
        "$ kubectl get salvagejobs -A -o wide\nNAMESPACE",
        "detection",
        "Imported",
        "Running",
        "Use it:",
        "Stop it:",
    ] {
        // The pod may be seen to run before the job is seen Imported.
        let at = rest.find(part).or_else(|| text.find(part).map(|_| 0));
        let at = at.with_context(|| format!("it does not say {part:?}:\n{text}"))?;
        rest = &rest[at..];
    }

    // Again, over the kept one; and this time nobody may help the pod.
    let mut demo = Demo::start(&[], false)?;
    demo.until("removed what an earlier demo left")?;
    demo.until("helm install")?;
    let cluster = host::wait_until("the namespace is opted in", Duration::from_secs(90), || {
        let Ok(cluster) = Cluster::attach(CLUSTER) else { return Ok(false) };
        let namespace = ["get", "namespace", "shop", "-o", "jsonpath={.metadata.annotations}"];
        Ok(host::run(&mut cluster.kubectl(&namespace)?).is_ok_and(|said| said.contains("tote.dev/allow")))
    })
    .and_then(|()| Cluster::attach(CLUSTER))?;
    host::run(&mut cluster.kubectl(&["annotate", "namespace", "shop", "tote.dev/allow-"])?)?;
    let (status, text) = demo.end()?;
    ensure!(status.code() == Some(1) && !is_up(), "nobody helped: {status}\n{text}");
    ensure!(text.contains(": ErrImagePull") && !text.contains("salvagejob"), "{text}");

    let (status, text) = Demo::start(&["down"], false)?.end()?;
    ensure!(status.success(), "down, with nothing up: {status}\n{text}");
    Ok(())
}
