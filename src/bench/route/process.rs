//! Processes under measurement, with their CPU time. Each ends with its owner.

use std::io::{BufRead, BufReader};
use std::process::{Child, ChildStderr, Command, Stdio};
use std::time::Duration;

use kvcellar_block::error::{Error, Result};

/// How long a process may take to be ready.
const READY: Duration = Duration::from_secs(20);

pub(super) fn dead(device: &str, problem: impl std::fmt::Display) -> Error {
    let remedy = "Run its command by hand to see what it says".to_owned();
    Error::DeviceDead { device: device.to_owned(), problem: problem.to_string(), remedy }
}

/// Waits until a GET of `url` answers well with a body that satisfies `enough`.
///
/// # Errors
/// [`Error::DeviceDead`] with this problem of the process, in the end.
pub(super) async fn answers(url: &str, enough: impl Fn(&str) -> bool, name: &str, problem: &str) -> Result<()> {
    let client = reqwest::Client::builder().no_proxy().build().map_err(|error| dead(name, error))?;
    let polled = async {
        loop {
            let answer = client.get(url).send().await.and_then(reqwest::Response::error_for_status);
            if let Ok(answer) = answer
                && answer.text().await.is_ok_and(|text| enough(&text))
            {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(READY, polled).await.map_err(|_| dead(name, problem))
}

/// A process.
#[derive(Debug)]
pub(super) struct Process {
    child: Child,
    name: &'static str,
}

impl Process {
    /// Starts it. What it writes to its standard output is dropped.
    ///
    /// # Errors
    /// [`Error::DeviceDead`].
    pub(super) fn start(name: &'static str, command: &mut Command) -> Result<Self> {
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn();
        Ok(Self { child: child.map_err(|error| dead(name, error))?, name })
    }

    /// CPU seconds of all its threads so far.
    ///
    /// # Errors
    /// [`Error::DeviceDead`] when it has ended.
    pub(super) fn cpu_s(&self) -> Result<f64> {
        let threads =
            std::fs::read_dir(format!("/proc/{}/task", self.child.id())).map_err(|error| dead(self.name, error))?;
        let mut ns = 0.0;
        for thread in threads.map_while(std::result::Result::ok) {
            // A thread that has just ended is not missed: routers and Envoy keep theirs.
            let text = std::fs::read_to_string(thread.path().join("schedstat")).unwrap_or_default();
            ns += text.split_whitespace().next().and_then(|field| field.parse::<f64>().ok()).unwrap_or(0.0);
        }
        if ns > 0.0 { Ok(ns / 1e9) } else { Err(dead(self.name, "its CPU time cannot be read")) }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // One that has ended by itself is as gone as one that is ended here.
        let _killed = self.child.kill();
        let _waited = self.child.wait();
    }
}

/// A router process and where it listens.
#[derive(Debug)]
pub(super) struct RouterProcess {
    pub(super) process: Process,
    pub(super) http: String,
    pub(super) picker_port: u16,
}

impl RouterProcess {
    /// Starts one and waits until it may send requests to all of its engines.
    ///
    /// # Errors
    /// [`Error::DeviceDead`].
    pub(super) async fn start(flags: &[String], engines: usize) -> Result<Self> {
        const NAME: &str = "the router";
        // As this process was called: the file behind a virtual environment's interpreter would not
        // find the package.
        let program = std::env::args_os().next().ok_or_else(|| dead(NAME, "this process has no name"))?;
        let program = std::path::PathBuf::from(program);
        let mut command = Command::new(&program);
        let is_ours = program.file_name().is_some_and(|name| name.to_string_lossy().starts_with("kvcellar"));
        if !is_ours {
            command.args(["-m", "kvcellar"]);
        }
        command.args(["route", "--http", "127.0.0.1:0", "--ext-proc", "127.0.0.1:0", "--admin", "127.0.0.1:0"]);
        let mut process = Process::start(NAME, command.args(flags).stderr(Stdio::piped()))?;
        let stderr = process.child.stderr.take().ok_or_else(|| dead(NAME, "it says nothing"))?;
        let (found, said) = tokio::sync::oneshot::channel();
        let listening =
            std::thread::Builder::new().name("kvcellar-log".to_owned()).spawn(move || listen(stderr, found));
        listening.map_err(|error| dead(NAME, error))?;
        let addresses = tokio::time::timeout(READY, said).await;
        let [admin, http, picker] =
            addresses.ok().and_then(std::result::Result::ok).ok_or_else(|| dead(NAME, "it does not start"))?;
        let picker_port = picker.rsplit_once(':').and_then(|(_, port)| port.parse().ok()).unwrap_or(0);
        let all_healthy = |text: &str| text.matches("\"healthy\"").count() == engines;
        answers(&format!("{admin}/debug/engines"), all_healthy, NAME, "its engines are not healthy").await?;
        Ok(Self { process, http, picker_port })
    }
}

/// Finds the three addresses in what a router says, and reads on so that it is never held up.
fn listen(stderr: ChildStderr, found: tokio::sync::oneshot::Sender<[String; 3]>) {
    const MARKS: [&str; 3] = ["admin at ", "router at ", "ext_proc at "];
    let mut addresses: [String; 3] = std::array::from_fn(|_| String::new());
    let mut found = Some(found);
    for line in BufReader::new(stderr).lines().map_while(std::result::Result::ok) {
        for (at, mark) in MARKS.iter().enumerate() {
            if let Some((_, address)) = line.split_once(*mark) {
                address.trim().clone_into(&mut addresses[at]);
            }
        }
        if addresses.iter().all(|address| !address.is_empty())
            && let Some(found) = found.take()
        {
            // Nobody waits any more when the start has timed out.
            let _sent = found.send(addresses.clone());
        }
    }
}
