//! Where engines are found: command line, a watched file, DNS.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;

use kvcellar_block::error::{Error, Result};
use kvcellar_events::subscriber::Address;

/// One address to follow.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// Its name in answers.
    pub name: String,
    /// The model that its engine serves.
    pub model: Option<String>,
    /// Where it is.
    pub address: Address,
}

/// One entry of a file of engines.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    name: Option<String>,
    endpoint: String,
    replay: Option<String>,
    model: Option<String>,
    #[serde(default)]
    bind: bool,
}

const REMEDY: &str = "Write e.g. endpoint=tcp://10.0.0.1:5557,replay=tcp://10.0.0.1:5558,name=a,model=m";

impl Entry {
    fn source(self) -> Result<Source> {
        let checked = |endpoint: String| {
            let scheme = ["tcp://", "ipc://"].iter().any(|scheme| endpoint.starts_with(scheme));
            if scheme {
                Ok(endpoint)
            } else {
                Err(Error::config("endpoint", format!("`{endpoint}` has no scheme"), REMEDY))
            }
        };
        let endpoint = checked(self.endpoint)?;
        let replay = self.replay.map(checked).transpose()?;
        let name = self.name.unwrap_or_else(|| endpoint.clone());
        Ok(Source { name, model: self.model, address: Address { endpoint, replay, bind: self.bind } })
    }
}

/// An engine as on the command line:
/// `endpoint=...[,replay=...][,name=...][,model=...][,bind=true]`, or an address alone.
///
/// # Errors
/// [`Error::Config`].
pub fn parse(text: &str) -> Result<Source> {
    if !text.contains('=') {
        let entry = Entry { name: None, endpoint: text.to_owned(), replay: None, model: None, bind: false };
        return entry.source();
    }
    let mut fields = fields(text, REMEDY)?;
    let mut take = |name: &str| fields.remove(name).map(str::to_owned);
    let entry = Entry {
        name: take("name"),
        endpoint: take("endpoint").ok_or_else(|| Error::config("engine", "`endpoint` is missing", REMEDY))?,
        replay: take("replay"),
        model: take("model"),
        bind: take("bind").is_some_and(|value| value == "true"),
    };
    none_left(&fields, REMEDY)?;
    entry.source()
}

/// The parts of `name=value,...`, each name once.
///
/// # Errors
/// [`Error::Config`].
pub fn fields<'t>(text: &'t str, remedy: &str) -> Result<BTreeMap<&'t str, &'t str>> {
    let mut fields = BTreeMap::new();
    for part in text.split(',') {
        let Some((name, value)) = part.split_once('=') else {
            return Err(Error::config("engine", format!("`{part}` has no `=`"), remedy));
        };
        if fields.insert(name.trim(), value.trim()).is_some() {
            return Err(Error::config("engine", format!("`{name}` stands twice"), remedy));
        }
    }
    Ok(fields)
}

/// Every part was known and taken.
///
/// # Errors
/// [`Error::Config`].
pub fn none_left(fields: &BTreeMap<&str, &str>, remedy: &str) -> Result<()> {
    match fields.keys().next() {
        Some(unknown) => Err(Error::config("engine", format!("`{unknown}` is not known"), remedy)),
        None => Ok(()),
    }
}

/// The engines in a JSON file: a list of objects with the fields of the command line.
///
/// # Errors
/// [`Error::Io`], [`Error::Config`].
pub fn read(path: &Path) -> Result<Vec<Source>> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| Error::io("reading", path, error, "Name a file with a JSON list of engines"))?;
    let entries: Vec<Entry> = serde_json::from_str(&text).map_err(|error| {
        let remedy =
            r#"Write a list like [{"name": "a", "endpoint": "tcp://10.0.0.1:5557", "replay": "tcp://10.0.0.1:5558"}]"#;
        Error::config("engines-file", error.to_string(), remedy)
    })?;
    entries.into_iter().map(Entry::source).collect()
}

/// The engines behind a name with one address for each of them: `host:port` or
/// `host:port:replay_port`.
///
/// # Errors
/// [`Error::Config`] for a wrong form; [`Error::TryLater`] when the name cannot be resolved.
pub async fn resolve(name: &str, model: Option<&str>) -> Result<Vec<Source>> {
    let wrong = || {
        Error::config(
            "dns",
            format!("`{name}` is no host:port"),
            "Write e.g. engines.svc:5557:5558 (host:port:replay port)",
        )
    };
    let parts: Vec<&str> = name.split(':').collect();
    let (host, port, replay) = match parts.as_slice() {
        [host, port] => (host, port, None),
        [host, port, replay] => (host, port, Some(replay)),
        _ => return Err(wrong()),
    };
    let number = |text: &str| text.parse::<u16>().map_err(|_| wrong());
    let (port, replay) = (number(port)?, replay.map(|port| number(port)).transpose()?);
    let found = tokio::net::lookup_host((*host, port)).await;
    let found =
        found.map_err(|error| Error::TryLater { what: format!("the name {host}"), holder: error.to_string() })?;
    let at = |address: std::net::IpAddr, port: u16| format!("tcp://{}", std::net::SocketAddr::new(address, port));
    let mut sources: Vec<Source> = found
        .map(|address| Source {
            name: address.to_string(),
            model: model.map(str::to_owned),
            address: Address {
                endpoint: at(address.ip(), port),
                replay: replay.map(|port| at(address.ip(), port)),
                bind: false,
            },
        })
        .collect();
    sources.sort_by(|a, b| a.name.cmp(&b.name));
    sources.dedup();
    Ok(sources)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn engines_on_the_command_line() {
        let source = parse("endpoint=tcp://h:1, replay=tcp://h:2,name=a,model=m").expect("an engine");
        assert_eq!((source.name.as_str(), source.model.as_deref()), ("a", Some("m")));
        assert_eq!(source.address.replay.as_deref(), Some("tcp://h:2"));
        assert_eq!(parse("tcp://h:1").expect("an address").name, "tcp://h:1");
        for wrong in
            ["h:1", "endpoint=h:1", "name=a", "endpoint=tcp://h:1,endpoint=tcp://h:1", "endpoint=tcp://h:1,nmae=a"]
        {
            let error = parse(wrong).expect_err(wrong).to_string();
            assert!(error.contains("tcp://10.0.0.1:5557"), "{error}");
        }
    }

    #[test]
    fn engines_in_a_file() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), r#"[{"endpoint": "tcp://h:1"}, {"endpoint": "ipc:///x", "bind": true}]"#)
            .expect("written");
        let sources = read(file.path()).expect("two engines");
        assert_eq!((sources.len(), sources[1].address.bind), (2, true));
        std::fs::write(file.path(), r#"[{"endpoint": "tcp://h:1", "colour": 1}]"#).expect("written");
        assert!(read(file.path()).expect_err("an unknown field").to_string().contains("colour"));
    }
}
