//! The program itself: its flags, health, metrics and exit codes, with no containerd there.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, ChildStderr, Command, Stdio};
use std::time::{Duration, Instant};

/// Ends the program when the test fails.
struct Program(Child);

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Program {
    fn start(arguments: &[&str]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tote-agent"));
        command.args(arguments).env_remove("NODE_NAME").env_remove("RUST_LOG");
        Self(command.stdin(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap())
    }

    fn stderr(&mut self) -> ChildStderr {
        self.0.stderr.take().unwrap()
    }

    fn exit_code(&mut self) -> i32 {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                return status.code().expect("it exits by itself");
            }
            assert!(Instant::now() < deadline, "it does not end");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

fn free() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

fn get(address: SocketAddr, path: &str) -> Option<String> {
    let mut stream = TcpStream::connect(address).ok()?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    Some(answer)
}

#[test]
fn without_containerd_it_waits_and_is_not_ready() {
    let (control, health) = (free(), free());
    let (listen, health_addr) = (control.to_string(), health.to_string());
    let mut program = Program::start(&[
        "--node-name=n1",
        "--listen",
        &listen,
        "--health-addr",
        &health_addr,
        "--containerd-socket=/nonexistent/containerd.sock",
        "--max-bandwidth=50Mi",
        "--token-file=/nonexistent/token",
        "--ca-file=/nonexistent/ca.crt",
    ]);
    let mut log = BufReader::new(program.stderr()).lines();
    // It says what it waits for, as JSON.
    let waiting =
        log.find(|line| line.as_ref().unwrap().contains("waiting for containerd")).unwrap().unwrap();
    let waiting: serde_json::Value = serde_json::from_str(&waiting).unwrap();
    assert_eq!(waiting["level"], "WARN", "{waiting}");
    assert!(get(health, "/healthz").unwrap().starts_with("HTTP/1.1 200"));
    let ready = get(health, "/readyz").unwrap();
    assert!(ready.starts_with("HTTP/1.1 503") && ready.contains("containerd does not answer"), "{ready}");
    let metrics = get(health, "/metrics").unwrap();
    for name in ["served_bytes_total", "received_bytes_total", "imports_running", "images", "sessions"] {
        assert!(metrics.contains(&format!("\ntote_agent_{name} 0\n")), "{name} is not in {metrics}");
    }
    // Nobody gets anything without TLS, and it is counted.
    let plain = get(control, "/v2/").unwrap_or_default();
    assert!(!plain.contains("HTTP/1.1"), "{plain}");
    // The connection is closed first, and counted then.
    let refused = "\ntote_agent_refused_total{reason=\"not_tls\"} 1\n";
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let metrics = get(health, "/metrics").unwrap();
        if metrics.contains(refused) {
            break;
        }
        assert!(Instant::now() < deadline, "{metrics}");
        std::thread::sleep(Duration::from_millis(20));
    }
    let pid = program.0.id().to_string();
    assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    assert_eq!(program.exit_code(), 0);
    assert!(log.any(|line| line.unwrap().contains("\"stopped\"")));
}

#[test]
fn what_it_cannot_start_with_is_named() {
    let busy = TcpListener::bind("127.0.0.1:0").unwrap();
    let listen = busy.local_addr().unwrap().to_string();
    for (arguments, says) in [
        (vec!["--node-name=n1", "--log-format=text", "--listen", &listen], listen.as_str()),
        (vec![], "--node-name"),
        (vec!["--node-name=n1", "--max-bandwidth=fast"], "write it as 50Mi"),
        (vec!["--node-name=n1", "--listen=9090"], "--listen"),
    ] {
        let mut program = Program::start(&arguments);
        let mut said = String::new();
        program.stderr().read_to_string(&mut said).unwrap();
        assert_eq!(program.exit_code(), 1, "{arguments:?}: {said}");
        assert!(said.contains(says), "{arguments:?}: {said}");
    }
}
