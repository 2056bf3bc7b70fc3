//! Where the router's engines are found beside the command line: a watched file, DNS, Kubernetes.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use super::engine::Spec;
use kvcellar_block::error::{Error, Result};

/// The engines in a JSON file: a list of objects with the fields of the command line.
///
/// # Errors
/// [`Error::Io`], [`Error::Config`].
pub fn read(path: &Path) -> Result<Vec<Spec>> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| Error::io("reading", path, error, "Name a file with a JSON list of engines"))?;
    let specs: Vec<Spec> = serde_json::from_str(&text).map_err(|error| {
        Error::config(
            "engines-file",
            error.to_string(),
            r#"Write a list like [{"name": "a", "url": "http://10.0.0.1:8000"}]"#,
        )
    })?;
    specs.into_iter().map(Spec::checked).collect()
}

/// Ports of engines that are found by their addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ports {
    /// Where they answer.
    pub http: u16,
    /// Where they publish their events and replay them.
    pub events: Option<(u16, u16)>,
}

impl Ports {
    /// Reads `port` or `port:events-port:replay-port`, as the option `field` gives them.
    ///
    /// # Errors
    /// [`Error::Config`].
    pub fn parse(field: &str, text: &str) -> Result<Self> {
        let wrong = || {
            Error::config(
                field,
                format!("`{text}` is no port:events-port:replay-port"),
                "Write e.g. 8000, or 8000:5557:5558 where engines publish events",
            )
        };
        let ports = text.split(':').map(|part| part.parse::<u16>().map_err(|_| wrong()));
        match ports.collect::<Result<Vec<_>>>()?.as_slice() {
            [http] => Ok(Self { http: *http, events: None }),
            [http, events, replay] => Ok(Self { http: *http, events: Some((*events, *replay)) }),
            _ => Err(wrong()),
        }
    }

    /// The engine at an address.
    pub fn engine(&self, name: Option<String>, ip: IpAddr) -> Spec {
        let http = SocketAddr::new(ip, self.http);
        let at = |port: u16| format!("tcp://{}", SocketAddr::new(ip, port));
        Spec {
            name: name.unwrap_or_else(|| http.to_string()),
            url: format!("http://{http}"),
            events: self.events.map(|(port, _)| at(port)),
            replay: self.events.map(|(_, port)| at(port)),
            draining: false,
        }
    }
}

/// The engines behind a name with one address for each of them: `host:port` or
/// `host:port:events-port:replay-port`.
///
/// # Errors
/// [`Error::Config`] for a wrong form; [`Error::TryLater`] when the name cannot be resolved.
pub async fn resolve(name: &str) -> Result<Vec<Spec>> {
    let (host, ports) = name.split_once(':').ok_or_else(|| {
        Error::config("dns", format!("`{name}` has no port"), "Write host:port or host:port:events-port:replay-port")
    })?;
    let ports = Ports::parse("dns", ports)?;
    let found = tokio::net::lookup_host((host, ports.http)).await;
    let found =
        found.map_err(|error| Error::TryLater { what: format!("the name {host}"), holder: error.to_string() })?;
    let mut specs: Vec<Spec> = found.map(|address| ports.engine(None, address.ip())).collect();
    specs.sort_by(|a, b| a.name.cmp(&b.name));
    specs.dedup();
    Ok(specs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_as_they_are_written() {
        let ports = Ports::parse("dns", "8000:5557:5558").expect("ports");
        let spec = ports.engine(Some("a".to_owned()), "fd00::1".parse().expect("an address"));
        assert_eq!((spec.name.as_str(), spec.url.as_str()), ("a", "http://[fd00::1]:8000"));
        assert_eq!(spec.replay.as_deref(), Some("tcp://[fd00::1]:5558"));
        assert_eq!(Ports::parse("dns", "1").expect("a port").events, None);
        for wrong in ["", "x", "1:2", "70000", "1:2:3:4"] {
            assert!(Ports::parse("dns", wrong).expect_err(wrong).to_string().contains("8000:5557:5558"));
        }
    }

    #[tokio::test]
    async fn a_name_gives_its_addresses() {
        let found = resolve("localhost:8000:5557:5558").await.expect("loopback");
        assert!(found.iter().any(|spec| spec.url == "http://127.0.0.1:8000"), "{found:?}");
        assert!(resolve("localhost").await.expect_err("no port").to_string().contains("has no port"));
    }

    #[test]
    fn a_file_of_engines() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), r#"[{"url": "http://h:1/"}, {"url": "http://h:2", "draining": true}]"#)
            .expect("written");
        let found = read(file.path()).expect("two engines");
        assert_eq!((found[0].name.as_str(), found[1].draining), ("h:1", true));
        std::fs::write(file.path(), r#"[{"url": "http://h:1", "colour": 1}]"#).expect("written");
        assert!(read(file.path()).expect_err("an unknown field").to_string().contains("colour"));
    }
}
