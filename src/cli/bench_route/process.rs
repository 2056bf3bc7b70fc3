//! Processes under measurement, with their CPU time. Each ends with its owner.

use std::io::{BufRead, BufReader};
use std::process::{Child, ChildStderr, Command, Stdio};
use std::time::Duration;

use crate::error::{Error, Result};

/// How long a process may take to be ready.
pub(super) const READY: Duration = Duration::from_secs(20);

pub(super) fn dead(device: &str, problem: impl std::fmt::Display) -> Error {
    let remedy = "Run its command by hand to see what it says".to_owned();
    Error::DeviceDead { device: device.to_owned(), problem: problem.to_string(), remedy }
}

/// A process.
#[derive(Debug)]
pub(super) struct Process {
    child: Child,
    name: &'static str,
}

/// Linux shows CPU time in hundredths of a second on every machine (`USER_HZ`).
const TICKS_PER_S: f64 = 100.0;

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
        let path = format!("/proc/{}/stat", self.child.id());
        let text = std::fs::read_to_string(path).map_err(|error| dead(self.name, error))?;
        // The name in parentheses may hold anything; user and system time are the 12th and 13th fields after it.
        let fields = text.rsplit_once(')').map(|(_, rest)| rest.split_whitespace()).into_iter().flatten();
        let ticks: Vec<f64> = fields.skip(11).take(2).filter_map(|field| field.parse().ok()).collect();
        match ticks.as_slice() {
            [user, system] => Ok((user + system) / TICKS_PER_S),
            _ => Err(dead(self.name, "its CPU time cannot be read")),
        }
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
        let program = std::env::current_exe().map_err(|error| dead(NAME, error))?;
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
        let client = reqwest::Client::builder().no_proxy().build().map_err(|error| dead(NAME, error))?;
        let well = async {
            loop {
                let answer = client.get(format!("{admin}/debug/engines")).send().await;
                let text = match answer {
                    Ok(answer) => answer.text().await.unwrap_or_default(),
                    Err(_) => String::new(),
                };
                if text.matches("\"healthy\"").count() == engines {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        tokio::time::timeout(READY, well).await.map_err(|_| dead(NAME, "its engines are not healthy"))?;
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
