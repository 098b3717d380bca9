//! The chart, as helm renders it without a cluster.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod monitoring;

use std::path::Path;
use std::process::Command;

use serde_json::Value;
use tote_controller::detect::class::{Class, Stance};
use tote_e2e::tools;

/// Standard output of helm, or its standard error if it failed. `{}` stands for the chart's directory.
fn helm(arguments: &[&str]) -> Result<String, String> {
    let chart = Path::new(env!("CARGO_MANIFEST_DIR")).join("../charts/tote");
    let arguments = arguments.iter().map(|a| a.replace("{}", chart.to_str().unwrap()));
    let output = Command::new(tools::helm().unwrap()).args(arguments).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
}

fn template(values: &[&str]) -> Result<String, String> {
    let mut arguments = vec!["template", "tote", "{}", "-n", "tote-system"];
    for value in values {
        arguments.extend(["--set", value]);
    }
    helm(&arguments)
}

/// Every value of values.yaml, set to something else, and what it must change in the output.
const EVERY_VALUE: &[(&str, &[&str])] = &[
    ("image.repository=registry.corp:5000/ops/tote", &["\"registry.corp:5000/ops/tote:0.1.0\""]),
    ("image.tag=0.9.9", &["\"localhost/tote:0.9.9\""]),
    ("image.pullPolicy=Never", &["imagePullPolicy: Never"]),
    ("imagePullSecrets[0].name=corp", &["imagePullSecrets:\n        - name: corp"]),
    ("config.enabled=false", &["--enabled=false"]),
    ("config.classes.salvage[0]=Denied", &["--salvage-class=Denied"]),
    ("config.classes.ignore[0]=NotFound", &["--ignore-class=NotFound"]),
    ("config.images.allowed[0]=r.corp/*", &["\"--allow-image=r.corp/*\""]),
    ("config.images.denied[0]=*/secret", &["\"--deny-image=*/secret\""]),
    ("config.images.maxSize=3Gi", &["--max-image-size=3Gi"]),
    ("config.metricsAddr=127.0.0.1:9999", &["--metrics-addr=127.0.0.1:9999", "containerPort: 9999"]),
    ("log.level=debug", &["value: \"debug\""]),
    ("log.format=json", &["--log-format=json"]),
    ("controller.replicas=2", &["replicas: 2"]),
    ("controller.maxConcurrentSalvages=7", &["--max-concurrent-salvages=7"]),
    ("controller.ambiguousTags=newest", &["--tag-policy=newest"]),
    ("controller.maxUploadsPerNode=8", &["--max-uploads-per-node=8"]),
    ("controller.maxConcurrentInCluster=99", &["--max-concurrent-in-cluster=99"]),
    ("controller.access=any", &["--access=any"]),
    ("controller.sessionTTL=7m", &["--session-ttl=7m"]),
    ("tls.certificateLifetime=90m", &["--certificate-lifetime=90m"]),
    ("tls.existingSecret=my-ca", &["--ca-secret=my-ca", "resourceNames: [my-ca]"]),
    ("controller.priorityClassName=mine", &["priorityClassName: mine"]),
    ("controller.resources.limits.memory=99Mi", &["memory: 99Mi"]),
    ("controller.nodeSelector.role=infra", &["role: infra"]),
    ("controller.tolerations[0].key=infra", &["- key: infra"]),
    ("controller.affinity.nodeAffinity.x=y", &["affinity:\n        nodeAffinity:\n          x: \"y\""]),
    (
        "agent.containerdSocket=/run/k3s/containerd/c.sock",
        &[
            "--containerd-socket=/run/k3s/containerd/c.sock",
            "mountPath: /run/k3s/containerd\n",
            "path: /run/k3s/containerd\n",
        ],
    ),
    (
        "agent.containerdRoot=/data/containerd",
        &[
            "mountPath: /data/containerd/io.containerd.content.v1.content\n              readOnly: true\n",
            "path: /data/containerd/io.containerd.content.v1.content\n",
        ],
    ),
    (
        "agent.kubeletDir=/data/kubelet",
        &[
            "--kubelet-dir=/data/kubelet\n",
            "mountPath: /data/kubelet/image_manager\n",
            "path: /data/kubelet/image_manager\n            type: DirectoryOrCreate\n",
        ],
    ),
    ("agent.maxBandwidth=50Mi", &["--max-bandwidth=50Mi"]),
    ("agent.maxUploadBandwidth=9Mi", &["--max-upload-bandwidth=9Mi"]),
    ("agent.priorityClassName=mine", &["priorityClassName: mine"]),
    ("agent.resources.limits.memory=98Mi", &["memory: 98Mi"]),
    ("agent.nodeSelector.pool=a", &["pool: a"]),
    ("agent.tolerations[0].key=only", &["- key: only"]),
    ("agent.affinity.nodeAffinity.x=z", &["affinity:\n        nodeAffinity:\n          x: z"]),
    ("agent.enabled=true", &["kind: DaemonSet"]),
];

#[test]
fn helm_finds_no_fault_with_it() {
    let said = helm(&["lint", "--strict", "{}"]).unwrap();
    assert!(said.contains("0 chart(s) failed"), "{said}");
    let all: Vec<&str> = EVERY_VALUE.iter().flat_map(|(value, _)| ["--set", value]).collect();
    helm(&[&["lint", "--strict", "{}"], &all[..]].concat()).unwrap();
}

#[test]
fn every_value_does_something() {
    let default = template(&[]).unwrap();
    for (value, expected) in EVERY_VALUE {
        let output = template(&[*value]).unwrap();
        for text in *expected {
            assert!(output.contains(text), "{value} puts no {text:?} into\n{output}");
            assert!(
                *value == "agent.enabled=true" || !default.contains(text),
                "{text:?} is there by default"
            );
        }
    }
    let all: Vec<&str> = EVERY_VALUE.iter().map(|(value, _)| *value).collect();
    template(&all).unwrap();
    let without = template(&["agent.enabled=false"]).unwrap();
    let services = without.matches("kind: Service\n").count();
    assert!(!without.contains("DaemonSet") && services == 1, "{services}: {without}"); // that of metrics
}

#[test]
fn the_names_that_people_type_hold() {
    let output = template(&[]).unwrap();
    let documents: Vec<&str> = output.split("\n---\n").collect();
    for (kind, name) in
        [("Deployment", "tote"), ("DaemonSet", "tote-agent"), ("Service", "tote-agent"), ("Lease", "tote")]
    {
        let is = |d: &&&str| {
            d.contains(&format!("\nkind: {kind}\n")) && d.contains(&format!("\n  name: {name}\n"))
        };
        let found = documents.iter().filter(is).count();
        assert_eq!(found, 1, "{kind} {name}");
    }
    for (kind, component) in [("Deployment", "controller"), ("DaemonSet", "agent")] {
        let workload = documents.iter().find(|d| d.contains(&format!("\nkind: {kind}\n"))).unwrap();
        for (label, value) in [
            ("name", "tote"),
            ("instance", "tote"),
            ("component", component),
            ("version", "\"0.1.0\""),
            ("managed-by", "Helm"),
        ] {
            let line = format!("app.kubernetes.io/{label}: {value}\n");
            assert!(workload.contains(&line), "{kind} lacks {line} in\n{workload}");
        }
    }
    let agents = documents.iter().find(|d| d.contains("\nkind: DaemonSet\n")).unwrap();
    assert!(agents.contains("\n      tolerations:\n        - operator: Exists"), "every taint: {agents}");
    assert!(agents.contains("priorityClassName: system-node-critical"), "{agents}");
    let crd = documents.iter().find(|d| d.contains("\n  name: salvagejobs.tote.dev\n")).unwrap();
    assert!(
        crd.contains("helm.sh/resource-policy: keep"),
        "an upgrade changes it, uninstalling leaves it: {crd}"
    );
    assert!(output.contains("containerPort: 8080") && output.contains("port: 9090"), "{output}");
    assert!(output.contains("image: \"localhost/tote:0.1.0\""), "the tag is the crates' version");
    assert!(output.contains("- --max-image-size=2Gi\n"), "what the README says: {output}");
    let unbounded = template(&["config.images.maxSize="]).unwrap();
    assert!(!unbounded.contains("--max-image-size"), "{unbounded}");
}

/// The certificate authority may be cert-manager's; then its Secret is what the controller follows and may read.
#[test]
fn cert_manager_can_make_the_authority() {
    let output = template(&["tls.certManager.enabled=true"]).unwrap();
    for text in [
        "kind: Issuer\nmetadata:\n  name: tote\n",
        "  selfSigned: {}",
        "  secretName: tote-cert-manager-ca\n  isCA: true",
        "encoding: PKCS8",
        "duration: 8760h",
        "renewBefore: 2920h",
        "    name: tote\n    kind: Issuer",
        "--ca-secret=tote-cert-manager-ca",
        "resourceNames: [tote-cert-manager-ca]",
    ] {
        assert!(output.contains(text), "{text:?} is not in\n{output}");
    }
    let theirs = [
        "tls.certManager.enabled=true",
        "tls.certManager.issuerRef.name=corp",
        "tls.certManager.issuerRef.kind=ClusterIssuer",
        "tls.certManager.duration=2400h",
        "tls.certManager.renewBefore=240h",
    ];
    let output = template(&theirs).unwrap();
    assert!(!output.contains("selfSigned"), "{output}");
    for text in ["    kind: ClusterIssuer\n    name: corp", "duration: 2400h", "renewBefore: 240h"] {
        assert!(output.contains(text), "{text:?} is not in\n{output}");
    }
    assert!(!template(&[]).unwrap().contains("cert-manager"));
    for (values, says) in [
        (&["tls.certManager.enabled=true", "tls.existingSecret=x"][..], "only one"),
        (&["tls.existingSecret=tote-ca"], "choose another"),
    ] {
        let error = template(values).unwrap_err();
        assert!(error.contains(says), "{values:?}: {error}");
    }
}

/// The receiver of notifications is reached with what is mounted, and nothing is mounted in vain.
#[test]
fn notifications_bring_their_secret_as_a_file() {
    let url = "notifications.url=https://hooks.test/a?b=c#d";
    let default = template(&[]).unwrap();
    for text in ["--notify", "/etc/tote/notify", "volumes:\n        - name: notify"] {
        assert!(!default.contains(text), "{default}");
    }
    let output = template(&[url]).unwrap();
    for text in [
        "- \"--notify-url=https://hooks.test/a?b=c#d\"\n",
        "--notify-types=detected,salvaged,salvage_failed,pushed,push_failed\n",
    ] {
        assert!(output.contains(text), "{text:?} is not in\n{output}");
    }
    assert!(!output.contains("/etc/tote/notify") && !output.contains("--notify-header"), "{output}");
    let output = template(&[
        url,
        "notifications.types={salvaged,salvage_failed}",
        "notifications.header.name=X-Tote-Secret",
        "notifications.header.existingSecret=hook",
        "notifications.header.key=bearer",
        "notifications.caConfigMap=corp-ca",
    ])
    .unwrap();
    for text in [
        "--notify-types=salvaged,salvage_failed\n",
        "--notify-header-name=X-Tote-Secret\n",
        "--notify-header-file=/etc/tote/notify/header/value\n",
        "--notify-ca-file=/etc/tote/notify/ca/ca.crt\n",
        "mountPath: /etc/tote/notify/header\n",
        "mountPath: /etc/tote/notify/ca\n",
        "secretName: hook\n            items:\n              - key: bearer\n                path: value\n",
        "name: corp-ca\n            items:\n              - key: ca.crt\n                path: ca.crt\n",
    ] {
        assert!(output.contains(text), "{text:?} is not in\n{output}");
    }
    let alone = template(&["notifications.header.existingSecret=hook"]).unwrap();
    assert_eq!(alone, default, "without a URL nothing is sent");
}

/// The controller may read Secrets of other namespaces only if it is to use them.
#[test]
fn registries_are_asked_only_where_that_is_switched_on() {
    let rule = "    resources: [secrets]\n    verbs: [get]\n";
    let asking = ["registryResolve.enabled=true", "registryResolve.registries[0]=*.example.com"];
    let using = [&asking[..], &["registryResolve.usePullSecrets=true"]].concat();
    assert!(template(&using).unwrap().contains(rule));
    for values in [&[][..], &asking, &["registryResolve.usePullSecrets=true"]] {
        let output = template(values).unwrap();
        assert!(!output.contains(rule), "{values:?}: {output}");
        assert_eq!(output.contains("--registry-"), values.len() == 2, "{values:?}: {output}");
    }
    let whole = [
        &using[..],
        &[
            "registryResolve.registries[1]=docker.io",
            "registryResolve.timeout=9s",
            "registryResolve.insecureRegistries[0]=10.0.0.1:5000",
            "registryResolve.caConfigMap=corp-ca",
        ],
    ];
    let output = template(&whole.concat()).unwrap();
    for text in [
        "- --registry-resolve=true\n",
        "- \"--registry-resolve-host=*.example.com\"\n",
        "- \"--registry-resolve-host=docker.io\"\n",
        "- --registry-use-pull-secrets=true\n",
        "- --registry-timeout=9s\n",
        "- \"--registry-insecure=10.0.0.1:5000\"\n",
        "- --registry-ca-file=/etc/tote/registry-ca/ca.crt\n",
        "mountPath: /etc/tote/registry-ca\n",
        "      volumes:\n        - name: registry-ca\n          configMap:\n            name: corp-ca\n",
    ] {
        assert!(output.contains(text), "{text:?} is not in\n{output}");
    }
    let error = template(&asking[..1]).unwrap_err();
    assert!(error.contains("registries"), "{error}");
}

/// What the agents' pods are given: a token for the controller alone, and whom to trust.
#[test]
fn agents_mount_no_token_of_the_api_server() {
    let output = template(&[]).unwrap();
    let agents = output.split("\n---\n").find(|d| d.contains("\nkind: DaemonSet\n")).unwrap();
    for text in ["automountServiceAccountToken: false", "audience: tote", "name: tote-ca\n"] {
        assert!(agents.contains(text), "{text:?} is not in\n{agents}");
    }
    assert!(!agents.contains("optional:"), "{agents}");
}

/// Of kubelet's directory, where also the Secrets of all pods of the node lie, the agents see one part.
#[test]
fn agents_mount_nothing_but_a_socket_blobs_and_records() {
    let output = template(&[]).unwrap();
    let agents = output.split("\n---\n").find(|d| d.contains("\nkind: DaemonSet\n")).unwrap();
    let paths: Vec<&str> = agents.lines().filter_map(|line| line.trim().strip_prefix("path: ")).collect();
    let of_the_host: Vec<&&str> =
        paths.iter().filter(|path| path.starts_with('/') && !path.ends_with('z')).collect();
    let content = "/var/lib/containerd/io.containerd.content.v1.content";
    assert_eq!(of_the_host, [&"/run/containerd", &content, &"/var/lib/kubelet/image_manager"]);
    let without = template(&["agent.containerdRoot="]).unwrap();
    assert!(!without.contains("io.containerd.content"), "{without}");
}

#[test]
fn a_bad_value_is_refused_by_name() {
    for (value, field) in [
        ("agent.containerdSocket=containerd.sock", "containerdSocket"),
        ("agent.kubeletDir=", "kubeletDir"),
        ("agent.containerdRoot=var/lib", "containerdRoot"),
        ("agent.kubeletDir=/var/lib/kubelet/", "kubeletDir"),
        ("agent.maxBandwidth=fast", "maxBandwidth"),
        ("controller.access=all", "access"),
        ("config.metricsAddr=8080", "metricsAddr"),
        ("config.enabled=perhaps", "enabled"),
        ("controller.maxConcurrentSalvages=0", "maxConcurrentSalvages"),
        ("controller.maxUploadsPerNode=0", "maxUploadsPerNode"),
        ("controller.maxConcurrentInCluster=0", "maxConcurrentInCluster"),
        ("controler.replicas=2", "controler"),
        ("controller.ambiguousTags=guess", "ambiguousTags"),
        ("log.format=xml", "format"),
        ("notifications.url=hooks.test", "url"),
        ("notifications.url=https://me:key@hooks.test/", "url"),
        ("notifications.types={salvage-failed}", "types"),
        ("notifications.header.name=X Y", "name"),
        ("serviceMonitor.interval=often", "interval"),
        ("prometheusRule.labels.a=true", "labels"),
        ("tls.certificateLifetime=ever", "certificateLifetime"),
        ("tls.enabled=false", "enabled"),
        ("registryResolve.timeout=ever", "timeout"),
        ("registryResolve.registries[0]=https://r.test", "registries"),
        ("registryResolve.registries[0]=*", "registries"),
        ("tls.certManager.issuerRef.kind=ClusterIssuer", "issuerRef"),
    ] {
        let error = template(&[value]).unwrap_err();
        assert!(error.contains(field) && error.contains("schema"), "{value}: {error}");
    }
}

/// The schema knows just the classes that the controller takes.
#[test]
fn classes_are_those_of_the_controller() {
    let schema: Value =
        serde_json::from_str(include_str!("../../../charts/tote/values.schema.json")).unwrap();
    let lists = &schema["properties"]["config"]["properties"]["classes"]["properties"];
    let names =
        |list: &str| -> Vec<String> { serde_json::from_value(lists[list]["items"]["enum"].clone()).unwrap() };
    let all = Class::ALL.map(|class| class.name().to_owned());
    let salvageable: Vec<_> =
        Class::ALL.into_iter().filter(|c| c.stance() != Stance::Never).map(|c| c.name().to_owned()).collect();
    assert_eq!((names("ignore"), names("salvage")), (all.into(), salvageable));
}
