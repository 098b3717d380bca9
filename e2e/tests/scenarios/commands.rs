//! The commands that people know, typed as they are written in runbooks, in a shell on a node.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use tote_e2e::host;
use tote_e2e::registry::Control as _;
use tote_e2e::tenant::Tenant;

use crate::play::Play;
use crate::stage::{SOON, Scenario};

pub fn all() -> Vec<Scenario> {
    vec![Scenario::new("commands_as_written", "n1", "n2", as_written)]
}

/// A shell with `kubectl` in PATH and the administrator's rights. It runs on a node, where the port that is forwarded
/// to is nobody else's.
struct Shell<'a>(&'a Play);

impl Shell<'_> {
    fn command(&self, script: &str) -> Result<Command> {
        let mut command = self.0.source()?.command(&["bash", "-c", &format!("set -o pipefail; {script}")])?;
        let kubectl = tote_e2e::tools::kubernetes()?;
        let path = std::env::var("PATH").unwrap_or_default();
        command.env("PATH", format!("{}:{path}", kubectl.display()));
        command.env("KUBECONFIG", self.0.cluster().kubeconfig());
        Ok(command)
    }

    fn run(&self, script: &str) -> Result<String> {
        let mut command = self.command(script)?;
        tokio::task::block_in_place(|| host::run(&mut command)).with_context(|| script.to_owned())
    }

    /// Until what it prints has `part`.
    async fn until(&self, script: &str, part: &str) -> Result<String> {
        let look = || async { Ok(Some(self.run(script)?).filter(|said| said.contains(part))) };
        self.0.tenant.until(&format!("{script} to print {part:?}"), SOON, look).await
    }
}

async fn as_written(play: Play) -> Result<()> {
    let tenant = Tenant::enter(play.tenant.client(), "myapp", false).await?;
    let outcome = type_them(&play).await;
    let report = if outcome.is_err() { tenant.report().await } else { String::new() };
    tenant.leave().await?;
    outcome.context(report)
}

async fn type_them(play: &Play) -> Result<()> {
    let shell = Shell(play);
    let image = play.image("tiny")?;
    let (tagged, _) = play.push(&image).await?;
    let nowhere = tagged.replace(":v1", ":v2");
    let (other, _) = play.push_as(&play.image_seeded("tiny", "late")?, "late").await?;
    play.pull_on_source(&other).await?;
    shell.run("kubectl annotate namespace myapp tote.dev/allow=true")?;
    shell.run(&format!("kubectl create deployment myapp -n myapp --image={tagged} --replicas=0"))?;
    let on_node = |node: &str| {
        let patch = format!(
            r#"{{"spec":{{"template":{{"spec":{{"nodeSelector":{{"kubernetes.io/hostname":"{node}"}}}}}}}}}}"#
        );
        shell.run(&format!("kubectl patch deployment myapp -n myapp -p '{patch}'"))
    };
    on_node("n1")?;
    shell.run("kubectl scale deployment myapp -n myapp --replicas=1")?;
    shell.run("kubectl rollout status deployment/myapp -n myapp --timeout=60s")?;
    shell.run(
        r#"kubectl patch deployment myapp -n myapp -p \
  '{"spec":{"template":{"metadata":{"annotations":{"tote.dev/auto-salvage":"true"}}}}}'"#,
    )?;
    shell.run("kubectl rollout status deployment/myapp -n myapp --timeout=60s")?;

    play.registry.stop()?;
    on_node("n2")?;
    shell.until("kubectl get events -n myapp --field-selector reason=ImageSalvageable", &tagged).await?;
    shell.run("kubectl rollout status deployment/myapp -n myapp --timeout=60s")?;
    shell.until("kubectl get events -n myapp --field-selector reason=ImageSalvaged", &tagged).await?;
    shell.run("kubectl wait -n myapp --for=condition=Imported salvagejob --all --timeout=60s")?;
    let table = shell.run("kubectl get salvagejobs -A -o wide")?;
    ensure!(table.contains("Imported") && table.contains("myapp"), "{table}");

    // A pod that already waits is opted in.
    shell.run(&format!(
        "kubectl run late -n myapp --image={other} --overrides='{{\"spec\":{{\"nodeName\":\"n2\"}}}}'"
    ))?;
    shell.until("kubectl get pod late -n myapp", "ImagePull").await?;
    shell.run("kubectl annotate pod -n myapp late tote.dev/auto-salvage=true")?;
    shell.run("kubectl wait -n myapp --for=condition=Ready pod/late --timeout=60s")?;

    shell.run(&format!("kubectl set image deployment/myapp -n myapp '*={nowhere}'"))?;
    shell.until("kubectl get events -n myapp --field-selector reason=ImageNotActionable", &nowhere).await?;

    let said = shell.run(r"kubectl get ns myapp -o jsonpath='{.metadata.annotations.tote\.dev/allow}'")?;
    ensure!(said == "true", "{said:?}");
    let pod = shell.run("kubectl get pod -n myapp -o name --field-selector status.phase=Running")?;
    let pod = pod.lines().next().context("no pod runs")?.trim_start_matches("pod/");
    let said = shell.run(&format!(
        r"kubectl get pod {pod} -n myapp -o jsonpath='{{.metadata.annotations.tote\.dev/auto-salvage}}'"
    ))?;
    ensure!(said == "true", "{said:?}");

    for logs in [
        "kubectl logs -n tote-system deploy/tote --tail=50",
        "kubectl logs deploy/tote -n tote-system | tail -20",
        "kubectl logs daemonset/tote-agent -n tote-system | tail -20",
    ] {
        ensure!(!shell.run(logs)?.trim().is_empty(), "{logs} prints nothing");
    }
    metrics(&shell).await
}

async fn metrics(shell: &Shell<'_>) -> Result<()> {
    let mut forward = shell.command("exec kubectl port-forward -n tote-system deploy/tote 8080:8080")?;
    let mut forward = forward.stdout(std::process::Stdio::null()).spawn()?;
    let look = || async { Ok(shell.run("curl -s localhost:8080/metrics | grep tote_").ok()) };
    let found = shell.0.tenant.until("the metrics by port-forward", Duration::from_secs(30), look).await;
    forward.kill()?;
    forward.wait()?;
    let found = found?;
    for (name, least) in [
        ("tote_detected_total", 2.0),
        ("tote_salvageable_total", 1.0),
        ("tote_not_actionable_total", 1.0),
        ("tote_salvage_success_total", 1.0),
        ("tote_salvage_failure_total", 0.0),
    ] {
        let value = found.lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<f64>().ok());
        ensure!(value.is_some_and(|value| value >= least), "{name} is {value:?} in\n{found}");
    }
    Ok(())
}
