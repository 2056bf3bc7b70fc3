//! An engine as the router is told of it.

use std::net::{IpAddr, SocketAddr};

use axum::http::Uri;
use serde::Deserialize;
use serde::de::{Deserializer, Error as _};

use kvcellar_block::error::{Error, Result};
use kvcellar_discovery::{EngineSpec, PodNotes, events_address, name_or_empty};
use kvcellar_index::fleet::Source;

pub use kvcellar_discovery::EngineRole;

/// An engine as it is named in options and files.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spec {
    /// Its name.
    #[serde(default, deserialize_with = "name_or_empty")]
    pub name: String,
    /// Where it answers, e.g. `http://10.0.0.1:8000` or `https://engines.example/a`.
    pub url: String,
    /// Where it publishes its events, e.g. `tcp://10.0.0.1:5557`.
    pub events: Option<String>,
    /// Where it replays them.
    pub replay: Option<String>,
    /// Which steps of a request it takes.
    #[serde(default)]
    pub role: EngineRole,
    /// Host and port at which other engines fetch its KV, e.g. `10.0.0.1:5710`; of its first
    /// data-parallel rank. See [`super::source`].
    pub peer: Option<String>,
    /// Its data-parallel rank, where each rank is an engine with an address of its own. Nobody has
    /// to tell it which rank a request is for.
    #[serde(default, deserialize_with = "number")]
    pub rank: Option<u32>,
    /// It gets no new requests. A state of an engine, not a part of what tells it apart: see
    /// [`Spec::is_same`].
    #[serde(default)]
    pub draining: bool,
}

impl EngineSpec for Spec {
    const ADDRESS: &'static str = "url";
    const FLAGS: &'static [&'static str] = &["draining"];
    const HELP: &'static str = "An engine: a URL like `http://10.0.0.1:8000`, or \
        `url=...[,events=tcp://...][,replay=tcp://...][,name=...][,role=prefill|decode][,rank=0][,peer=HOST:PORT][,draining=true]`. May be repeated";
    const EXAMPLE: &'static str =
        "url=http://10.0.0.1:8000,events=tcp://10.0.0.1:5557,replay=tcp://10.0.0.1:5558,name=a";
    const FILE_EXAMPLE: &'static str = r#"[{"name": "a", "url": "http://10.0.0.1:8000"}]"#;
    const PORTS: &'static str = "port[:events-port:replay-port]";
    const PORTS_DEFAULT: &'static str = "8000:5557:5558";
    const HAS_PRIORITIES: bool = true;

    fn checked(mut self) -> Result<Self> {
        let wrong = || {
            let problem = format!("`{}` is no http://host:port or https://host, with or without a path", self.url);
            Error::config("url", problem, format!("Write e.g. {}", Self::EXAMPLE))
        };
        let (scheme, rest) = self.url.split_once("://").ok_or_else(wrong)?;
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        let default_port = match scheme {
            "http" => None,
            "https" => Some("443"),
            _ => return Err(wrong()),
        };
        // Behind the last colon, unless that is a part of an address in brackets.
        let port = authority.rsplit_once(':').map(|(_, port)| port).filter(|port| !port.ends_with(']'));
        let authority = match (port, default_port) {
            (Some(port), _) if port.parse::<u16>().is_ok() => authority.to_owned(),
            (None, Some(port)) => format!("{authority}:{port}"),
            _ => return Err(wrong()),
        };
        let path = path.trim_end_matches('/');
        let url =
            if path.is_empty() { format!("{scheme}://{authority}") } else { format!("{scheme}://{authority}/{path}") };
        let is_plain = path.bytes().all(|byte| byte.is_ascii_graphic() && !b"?#".contains(&byte));
        if authority.starts_with(':') || !is_plain || url.parse::<Uri>().is_err() {
            return Err(wrong());
        }
        for (name, address) in [("events", &self.events), ("replay", &self.replay)] {
            if let Some(address) = address {
                events_address::<Self>(name, address)?;
            }
        }
        if let Some(peer) = &self.peer {
            let parts = peer.rsplit_once(':').filter(|(host, _)| !host.is_empty());
            if parts.and_then(|(_, port)| port.parse::<u16>().ok()).is_none() {
                let remedy = "Write host and port, e.g. peer=10.0.0.1:5710";
                return Err(Error::config("peer", format!("`{peer}` is no HOST:PORT"), remedy));
            }
        }
        if self.name.is_empty() {
            self.name = authority;
        }
        self.url = url;
        Ok(self)
    }

    fn at(name: String, ip: IpAddr, ports: &[u16]) -> Option<Self> {
        let (http, events) = match ports {
            [http] => (http, None),
            [http, events, replay] => (http, Some((events, replay))),
            _ => return None,
        };
        let at = |port: &u16| format!("tcp://{}", SocketAddr::new(ip, *port));
        Some(Self {
            name,
            url: format!("http://{}", SocketAddr::new(ip, *http)),
            events: events.map(|(port, _)| at(port)),
            replay: events.map(|(_, port)| at(port)),
            role: EngineRole::Both,
            peer: None,
            rank: None,
            draining: false,
        })
    }

    fn of_pool(name: String, ip: IpAddr, target: u16, (events, replay): (u16, Option<u16>)) -> Self {
        let at = |port| SocketAddr::new(ip, port);
        Self {
            name,
            url: format!("http://{}", at(target)),
            events: Some(format!("tcp://{}", at(events))),
            replay: replay.map(|port| format!("tcp://{}", at(port))),
            role: EngineRole::Both,
            peer: None,
            rank: None,
            draining: false,
        }
    }

    fn noted(self, PodNotes { role, draining, rank }: PodNotes) -> Self {
        Self { role, rank, draining, ..self }
    }

    fn name(&self) -> &str {
        &self.name
    }
}

impl Spec {
    /// The same engine, draining or not.
    pub fn is_same(&self, other: &Self) -> bool {
        Self { draining: other.draining, ..self.clone() } == *other
    }

    /// Host and port.
    pub fn authority(&self) -> &str {
        let rest = self.url.split_once("://").map_or(self.url.as_str(), |(_, rest)| rest);
        rest.split('/').next().unwrap_or(rest)
    }

    /// Its events, for the index.
    pub fn source(&self) -> Option<Source> {
        let endpoint = self.events.clone()?;
        // Keys do not name the model, whatever topics say: an engine is only asked about requests
        // for what it serves.
        let model = Some(String::new());
        Some(Source { name: self.name.clone(), endpoint, replay: self.replay.clone(), model, bind: false })
    }
}

/// Reads a number as files write it, or as text, as options do.
fn number<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Option<u32>, D::Error> {
    let value = serde_json::Value::deserialize(deserializer)?;
    let text = match &value {
        serde_json::Value::Null => return Ok(None),
        serde_json::Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    text.parse().map(Some).map_err(|_| D::Error::custom(format!("`{text}` is no number of 0 or more")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvcellar_discovery::{parse, read_file};

    #[test]
    fn engines_as_they_are_written() {
        let spec: Spec = parse("http://h:8000/").expect("an engine");
        assert_eq!((spec.name.as_str(), spec.authority()), ("h:8000", "h:8000"));
        let spec: Spec = parse("url=http://h:1, name=a,events=tcp://h:2,replay=tcp://h:3").expect("an engine");
        let source = spec.source().expect("events");
        assert_eq!((source.name.as_str(), source.replay.as_deref()), ("a", Some("tcp://h:3")));
        for wrong in [
            "h:8000",
            "ftp://h:1",
            "http://h",
            "http://:1",
            "http://h:x",
            "https://h:99999",
            "http://h:1/a b",
            "http://h:1/a?b=c",
            "http://[::1]",
            "url=http://h:1,x=1",
            "name=a",
            "url=http://h:1,url=http://h:2",
            "url=http://h:1,events=h:2",
            "url=http://h:1,peer=h",
            "url=http://h:1,peer=:5710",
            "url=http://h:1,rank=x",
        ] {
            assert!(parse::<Spec>(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn engines_behind_tls_and_below_a_path() {
        let read = |text: &str| {
            let spec: Spec = parse(text).expect(text);
            (spec.authority().to_owned(), spec.url)
        };
        assert_eq!(read("https://h"), ("h:443".to_owned(), "https://h:443".to_owned()));
        assert_eq!(read("https://[::1]"), ("[::1]:443".to_owned(), "https://[::1]:443".to_owned()));
        assert_eq!(read("https://h:8443/a/b/"), ("h:8443".to_owned(), "https://h:8443/a/b".to_owned()));
        assert_eq!(
            read("http://[fd00::1]:8000/x"),
            ("[fd00::1]:8000".to_owned(), "http://[fd00::1]:8000/x".to_owned())
        );
        assert_eq!(parse::<Spec>("https://h/a").expect("an engine").name, "h:443");
    }

    #[test]
    fn engines_at_an_address() {
        let ip = "fd00::1".parse().expect("an address");
        let spec = Spec::at("a".to_owned(), ip, &[8000, 5557, 5558]).expect("an engine");
        assert_eq!((spec.name.as_str(), spec.url.as_str()), ("a", "http://[fd00::1]:8000"));
        assert_eq!(spec.replay.as_deref(), Some("tcp://[fd00::1]:5558"));
        assert_eq!(Spec::at("a".to_owned(), ip, &[1]).expect("an engine").events, None);
        assert!(Spec::at("a".to_owned(), ip, &[1, 2]).is_none() && Spec::at("a".to_owned(), ip, &[1; 4]).is_none());
    }

    #[test]
    fn engines_of_a_pool() {
        let ip = "10.0.0.1".parse().expect("an address");
        let spec = Spec::of_pool("a-rank-3".to_owned(), ip, 8003, (5560, Some(5660)));
        let spec = spec.noted(PodNotes { role: EngineRole::Decode, draining: true, rank: Some(3) });
        let written = "name=a-rank-3,url=http://10.0.0.1:8003,events=tcp://10.0.0.1:5560,\
            replay=tcp://10.0.0.1:5660,role=decode,rank=3,draining=true";
        assert_eq!(spec, parse::<Spec>(written).expect("an engine"));
        assert!(spec.is_same(&Spec { draining: false, ..spec.clone() }));
        assert!(!spec.is_same(&Spec { rank: None, ..spec.clone() }));
    }

    #[test]
    fn a_file_of_engines() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), r#"[{"url": "http://h:1/"}, {"url": "http://h:2", "rank": 1, "draining": true}]"#)
            .expect("written");
        let found: Vec<Spec> = read_file(file.path()).expect("two engines");
        assert_eq!((found[0].name.as_str(), found[1].rank, found[1].draining), ("h:1", Some(1), true));
        std::fs::write(file.path(), r#"[{"url": "http://h:1", "colour": 1}]"#).expect("written");
        assert!(read_file::<Spec>(file.path()).expect_err("an unknown field").to_string().contains("colour"));
    }
}
