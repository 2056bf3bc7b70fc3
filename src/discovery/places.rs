//! The places where engines are looked for, as flags, and looking there again while a command runs.

use std::marker::PhantomData;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use clap::Args;

use super::engine::{EngineSpec, parse, read_file};
use super::kubernetes::{Cluster, ClusterOptions, Priorities, Waiter};
use super::ports::Ports;
use kvcellar_block::error::{Error, Result};

/// Option with the ports of pods.
const KUBERNETES_PORTS: &str = "kubernetes-ports";

/// Time between two looks.
const EVERY: Duration = Duration::from_secs(2);

/// Where engines are found.
#[derive(Debug, Clone, Args)]
pub struct Places<E: EngineSpec> {
    #[arg(long = "engine", value_name = "ENGINE", help = E::HELP)]
    engines: Vec<String>,
    /// A JSON file with a list of engines, read again when it changes.
    #[arg(long)]
    engines_file: Option<PathBuf>,
    #[arg(long, help = format!(
        "A name that resolves to every engine (a headless service): host:{}. Resolved again every few seconds",
        E::PORTS
    ))]
    dns: Option<String>,
    #[command(flatten)]
    cluster: ClusterOptions,
    #[arg(long, default_value = E::PORTS_DEFAULT, help = format!("Ports of pods found by --kubernetes-labels: {}", E::PORTS))]
    kubernetes_ports: String,
    #[arg(skip)]
    of: PhantomData<E>,
}

/// Nobody was named, and nobody can come.
pub fn nobody() -> Error {
    let remedy = "Give --engine, --engines-file, --dns, --kubernetes-labels or --inference-pool";
    Error::config("engine", "no engine is named", remedy)
}

impl<E: EngineSpec> Places<E> {
    /// Begins to look.
    ///
    /// # Errors
    /// [`Error::Config`]; [`Error::TryLater`] when the Kubernetes API cannot be reached.
    pub async fn open(&self) -> Result<Finder<'_, E>> {
        Ports::parse::<E>(KUBERNETES_PORTS, &self.kubernetes_ports)?;
        let cluster = if self.cluster.is_given() { Some(self.cluster.watch(E::HAS_PRIORITIES).await?) } else { None };
        Ok(Finder { places: self, cluster })
    }

    /// Other engines may be found later.
    pub fn may_change(&self) -> bool {
        self.engines_file.is_some() || self.dns.is_some() || self.cluster.is_given()
    }
}

/// Looks for engines, for as long as it lives.
#[derive(Debug)]
pub struct Finder<'p, E: EngineSpec> {
    places: &'p Places<E>,
    cluster: Option<Cluster>,
}

impl<E: EngineSpec> Finder<'_, E> {
    /// All engines there are now.
    ///
    /// # Errors
    /// [`Error::Config`], [`Error::Io`]; [`Error::TryLater`] when a name cannot be resolved.
    pub async fn look(&self) -> Result<Vec<E>> {
        let places = self.places;
        let mut found = places.engines.iter().map(|text| parse(text)).collect::<Result<Vec<E>>>()?;
        if let Some(path) = &places.engines_file {
            found.extend(read_file::<E>(path)?);
        }
        if let Some(name) = &places.dns {
            found.extend(resolve::<E>(name).await?);
        }
        if let Some(cluster) = &self.cluster {
            found.extend(cluster.engines::<E>(&Ports::parse::<E>(KUBERNETES_PORTS, &places.kubernetes_ports)?)?);
        }
        Ok(found)
    }

    /// Looks again for ever, and passes on what is found: at every change in a cluster, every few
    /// seconds where a name is asked for engines, and when the file has changed. What cannot be
    /// read leaves the engines as they are and is logged once.
    pub async fn keep(&self, set: impl FnMut(Vec<E>)) {
        self.keep_every(EVERY, set).await;
    }

    async fn keep_every(&self, every: Duration, mut set: impl FnMut(Vec<E>)) {
        let file = self.places.engines_file.as_deref();
        let (mut last_change, mut last_problem) = (changed_at(file), String::new());
        let mut waiter = self.cluster.as_ref().map(Cluster::waiter);
        loop {
            let cluster_has_changed = tokio::select! {
                () = tokio::time::sleep(every) => false,
                () = changed(waiter.as_mut()) => true,
            };
            let change = changed_at(file);
            if !cluster_has_changed && self.places.dns.is_none() && change == last_change {
                continue;
            }
            last_change = change;
            match self.look().await {
                Ok(found) => {
                    last_problem.clear();
                    set(found);
                }
                Err(error) if error.to_string() != last_problem => {
                    last_problem = error.to_string();
                    log::warn!("{last_problem}; the engines stay as they were");
                }
                Err(_) => {}
            }
        }
    }

    /// Passes on the priorities of a pool's objectives, now and at every change, for ever.
    pub async fn keep_priorities(&self, mut set: impl FnMut(Priorities)) {
        let mut waiter = self.cluster.as_ref().map(Cluster::waiter);
        loop {
            if let Some(cluster) = &self.cluster {
                set(cluster.objectives());
            }
            changed(waiter.as_mut()).await;
        }
    }
}

/// Returns at a change in a cluster; never, where there is none.
async fn changed(waiter: Option<&mut Waiter>) {
    match waiter {
        Some(waiter) => waiter.changed().await,
        None => std::future::pending().await,
    }
}

fn changed_at(file: Option<&Path>) -> Option<SystemTime> {
    file.and_then(|path| path.metadata().ok()?.modified().ok())
}

/// The engines behind a name with one address for each of them: `host:` and their ports.
async fn resolve<E: EngineSpec>(name: &str) -> Result<Vec<E>> {
    let Some((host, ports)) = name.split_once(':') else {
        let remedy = format!("Write host:{}, e.g. engines.svc:{}", E::PORTS, E::PORTS_DEFAULT);
        return Err(Error::config("dns", format!("`{name}` has no port"), remedy));
    };
    let ports = Ports::parse::<E>("dns", ports)?;
    let found = tokio::net::lookup_host((host, ports.numbers.first().copied().unwrap_or_default())).await;
    let found =
        found.map_err(|error| Error::TryLater { what: format!("the name {host}"), holder: error.to_string() })?;
    let mut engines: Vec<E> = found.map(|address| ports.engine(None, address.ip())).collect::<Result<_>>()?;
    engines.sort_by(|a, b| a.name().cmp(b.name()));
    engines.dedup();
    Ok(engines)
}

#[cfg(test)]
mod tests {
    use super::super::engine::tests::Plain;
    use super::*;

    #[derive(Debug, clap::Parser)]
    struct Command {
        #[command(flatten)]
        places: Places<Plain>,
    }

    fn places(arguments: &[&str]) -> Places<Plain> {
        let all = ["command"].iter().chain(arguments);
        <Command as clap::Parser>::try_parse_from(all).expect("arguments").places
    }

    async fn engines(places: &Places<Plain>) -> Result<Vec<Plain>> {
        places.open().await?.look().await
    }

    #[test]
    fn flags_of_a_cluster_go_together() {
        let refused = |arguments: &[&str]| {
            let all = ["command"].iter().chain(arguments);
            <Command as clap::Parser>::try_parse_from(all).expect_err("refused").to_string()
        };
        assert!(refused(&["--inference-pool", "p", "--kubernetes-labels", "a=b"]).contains("cannot be used with"));
        assert!(refused(&["--kubernetes-namespace", "n"]).contains("--inference-pool"));
        assert!(refused(&["--inference-pool-events", "1:2"]).contains("--inference-pool"));
        assert!(places(&["--inference-pool", "p", "--kubernetes-namespace", "n"]).may_change());
    }

    #[tokio::test]
    async fn a_name_gives_its_addresses() {
        let found = engines(&places(&["--dns", "localhost:8000"])).await.expect("loopback");
        assert!(found.contains(&parse("events=tcp://127.0.0.1:8000,name=127.0.0.1:8000").expect("an engine")));
        for wrong in ["localhost", "localhost:", "localhost:x", "localhost:1:2", "localhost:70000"] {
            let error = engines(&places(&["--dns", wrong])).await.expect_err(wrong).to_string();
            assert!(error.contains("port"), "{wrong}: {error}");
        }
    }

    #[tokio::test]
    async fn all_places_are_looked_at() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), r#"[{"events": "tcp://h:2"}]"#).expect("written");
        let path = file.path().to_str().expect("a path");
        let places = places(&["--engine", "tcp://h:1", "--engines-file", path]);
        let found = engines(&places).await.expect("engines");
        assert_eq!(found.iter().map(EngineSpec::name).collect::<Vec<_>>(), ["tcp://h:1", "tcp://h:2"]);
        assert!(places.may_change());
    }

    #[tokio::test]
    async fn a_changed_file_is_read_again_and_a_broken_one_changes_nothing() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let write = |text: &str, second: u64| {
            std::fs::write(file.path(), text).expect("written");
            let at = SystemTime::UNIX_EPOCH + Duration::from_secs(second);
            file.as_file().set_modified(at).expect("a time");
        };
        write("[]", 1);
        let places = places(&["--engines-file", file.path().to_str().expect("a path")]);
        let counts = std::cell::RefCell::new(Vec::new());
        let finder = places.open().await.expect("flags alone");
        let keeping = finder.keep_every(Duration::from_millis(1), |found| counts.borrow_mut().push(found.len()));
        let changing = async {
            let pause = || tokio::time::sleep(Duration::from_millis(50));
            pause().await;
            assert!(counts.borrow().is_empty(), "nothing has changed");
            write("[", 2);
            pause().await;
            assert!(counts.borrow().is_empty(), "it cannot be read");
            write(r#"[{"events": "tcp://h:1"}]"#, 3);
            while counts.borrow().is_empty() {
                pause().await;
            }
        };
        tokio::select! {
            () = keeping => {}
            () = changing => {}
        }
        assert_eq!(*counts.borrow(), [1]);
    }
}
