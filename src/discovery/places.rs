//! The places where engines are looked for, as flags, and looking there again while a command runs.

use std::marker::PhantomData;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use clap::Args;

use super::engine::{EngineSpec, parse, read_file};
use kvcellar_block::error::{Error, Result};

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
    #[cfg(feature = "kubernetes")]
    #[command(flatten)]
    pods: Option<super::pods::Pods>,
    #[cfg(feature = "kubernetes")]
    #[arg(long, default_value = E::PORTS_DEFAULT, help = format!("Ports of engines that are pods: {}", E::PORTS))]
    kubernetes_ports: String,
    #[arg(skip)]
    of: PhantomData<E>,
}

/// Nobody was named, and nobody can come.
pub fn nobody() -> Error {
    Error::config("engine", "no engine is named", "Give --engine, --engines-file or --dns")
}

impl<E: EngineSpec> Places<E> {
    /// All engines there are now.
    ///
    /// # Errors
    /// [`Error::Config`], [`Error::Io`]; [`Error::TryLater`] when a name cannot be resolved or pods
    /// cannot be listed.
    pub async fn look(&self) -> Result<Vec<E>> {
        let mut found = self.engines.iter().map(|text| parse(text)).collect::<Result<Vec<E>>>()?;
        if let Some(path) = &self.engines_file {
            found.extend(read_file::<E>(path)?);
        }
        if let Some(name) = &self.dns {
            found.extend(resolve::<E>(name).await?);
        }
        #[cfg(feature = "kubernetes")]
        if let Some(pods) = &self.pods {
            let ports = Ports::parse::<E>("kubernetes-ports", &self.kubernetes_ports)?;
            for (name, ip) in pods.look().await? {
                found.push(ports.engine(Some(name), ip)?);
            }
        }
        Ok(found)
    }

    /// Other engines may be found later.
    pub fn may_change(&self) -> bool {
        self.engines_file.is_some() || self.is_asked_again()
    }

    /// Looks again for ever, and passes on what is found: every few seconds where names or pods are
    /// asked for engines, else when the file has changed. What cannot be read leaves the engines as
    /// they are and is logged once.
    pub async fn keep(&self, set: impl FnMut(Vec<E>)) {
        self.keep_every(EVERY, set).await;
    }

    async fn keep_every(&self, every: Duration, mut set: impl FnMut(Vec<E>)) {
        let (mut last_change, mut last_problem) = (changed_at(self.engines_file.as_deref()), String::new());
        loop {
            tokio::time::sleep(every).await;
            let change = changed_at(self.engines_file.as_deref());
            if !self.is_asked_again() && change == last_change {
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

    /// Some engines are found anew every time.
    fn is_asked_again(&self) -> bool {
        #[cfg(feature = "kubernetes")]
        let pods = self.pods.is_some();
        #[cfg(not(feature = "kubernetes"))]
        let pods = false;
        self.dns.is_some() || pods
    }
}

fn changed_at(file: Option<&Path>) -> Option<SystemTime> {
    file.and_then(|path| path.metadata().ok()?.modified().ok())
}

/// Ports of engines that are found by their addresses.
struct Ports<'t> {
    /// The option that gives them, and its value.
    from: (&'static str, &'t str),
    numbers: Vec<u16>,
}

impl<'t> Ports<'t> {
    fn parse<E: EngineSpec>(field: &'static str, text: &'t str) -> Result<Self> {
        let from = (field, text);
        let numbers = text.split(':').map(|part| part.parse::<u16>().map_err(|_| Self::wrong::<E>(from)));
        Ok(Self { from, numbers: numbers.collect::<Result<_>>()? })
    }

    fn wrong<E: EngineSpec>((field, text): (&str, &str)) -> Error {
        Error::config(field, format!("`{text}` is no {}", E::PORTS), format!("Write e.g. {}", E::PORTS_DEFAULT))
    }

    /// The engine at an address, named by its first port there unless it has a name.
    fn engine<E: EngineSpec>(&self, name: Option<String>, ip: IpAddr) -> Result<E> {
        let first = self.numbers.first().copied().unwrap_or_default();
        let name = name.unwrap_or_else(|| SocketAddr::new(ip, first).to_string());
        E::at(name, ip, &self.numbers).ok_or_else(|| Self::wrong::<E>(self.from))
    }
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

    #[tokio::test]
    async fn a_name_gives_its_addresses() {
        let found = places(&["--dns", "localhost:8000"]).look().await.expect("loopback");
        assert!(found.contains(&parse("events=tcp://127.0.0.1:8000,name=127.0.0.1:8000").expect("an engine")));
        for wrong in ["localhost", "localhost:", "localhost:x", "localhost:1:2", "localhost:70000"] {
            let error = places(&["--dns", wrong]).look().await.expect_err(wrong).to_string();
            assert!(error.contains("port"), "{wrong}: {error}");
        }
    }

    #[tokio::test]
    async fn all_places_are_looked_at() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), r#"[{"events": "tcp://h:2"}]"#).expect("written");
        let path = file.path().to_str().expect("a path");
        let places = places(&["--engine", "tcp://h:1", "--engines-file", path]);
        let found = places.look().await.expect("engines");
        assert_eq!(found.iter().map(EngineSpec::name).collect::<Vec<_>>(), ["tcp://h:1", "tcp://h:2"]);
        assert!(places.may_change() && !places.is_asked_again());
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
        let keeping = places.keep_every(Duration::from_millis(1), |found| counts.borrow_mut().push(found.len()));
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
