//! An engine as the index follows it.

use std::net::{IpAddr, SocketAddr};

use serde::Deserialize;

use kvcellar_block::error::Result;
use kvcellar_discovery::{EngineSpec, events_address, name_or_empty};
use kvcellar_events::subscriber::Address;

/// One address to follow, as it is written in options and files.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Source {
    /// Its name in answers.
    #[serde(default, deserialize_with = "name_or_empty")]
    pub name: String,
    /// Where it publishes its events, e.g. `tcp://10.0.0.1:5557`.
    pub endpoint: String,
    /// Where it replays them.
    pub replay: Option<String>,
    /// The model that its engine serves.
    pub model: Option<String>,
    /// Publishers connect to `endpoint`, which is ours.
    #[serde(default)]
    pub bind: bool,
}

impl EngineSpec for Source {
    const ADDRESS: &'static str = "endpoint";
    const FLAGS: &'static [&'static str] = &["bind"];
    const HELP: &'static str = "An engine: an address like `tcp://10.0.0.1:5557`, or \
        endpoint=...,replay=...,name=...,model=...[,bind=true]. May be repeated";
    const EXAMPLE: &'static str = "endpoint=tcp://10.0.0.1:5557,replay=tcp://10.0.0.1:5558,name=a,model=m";
    const FILE_EXAMPLE: &'static str =
        r#"[{"name": "a", "endpoint": "tcp://10.0.0.1:5557", "replay": "tcp://10.0.0.1:5558"}]"#;
    const PORTS: &'static str = "port[:replay-port]";
    const PORTS_DEFAULT: &'static str = "5557:5558";

    fn checked(mut self) -> Result<Self> {
        events_address::<Self>("endpoint", &self.endpoint)?;
        if let Some(replay) = &self.replay {
            events_address::<Self>("replay", replay)?;
        }
        if self.name.is_empty() {
            self.name.clone_from(&self.endpoint);
        }
        Ok(self)
    }

    fn at(name: String, ip: IpAddr, ports: &[u16]) -> Option<Self> {
        let (port, replay) = match ports {
            [port] => (port, None),
            [port, replay] => (port, Some(replay)),
            _ => return None,
        };
        let at = |port: &u16| format!("tcp://{}", SocketAddr::new(ip, *port));
        Some(Self { name, endpoint: at(port), replay: replay.map(at), model: None, bind: false })
    }

    fn of_pool(name: String, ip: IpAddr, _target: u16, (events, replay): (u16, Option<u16>)) -> Self {
        let at = |port| format!("tcp://{}", SocketAddr::new(ip, port));
        Self { name, endpoint: at(events), replay: replay.map(at), model: None, bind: false }
    }

    fn name(&self) -> &str {
        &self.name
    }
}

impl Source {
    /// Its sockets.
    pub fn address(&self) -> Address {
        Address { endpoint: self.endpoint.clone(), replay: self.replay.clone(), bind: self.bind }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvcellar_discovery::{parse, read_file};

    #[test]
    fn engines_on_the_command_line() {
        let source: Source = parse("endpoint=tcp://h:1, replay=tcp://h:2,name=a,model=m").expect("an engine");
        assert_eq!((source.name.as_str(), source.model.as_deref()), ("a", Some("m")));
        assert_eq!(source.replay.as_deref(), Some("tcp://h:2"));
        assert_eq!(parse::<Source>("tcp://h:1").expect("an address").name, "tcp://h:1");
        for wrong in ["h:1", "endpoint=h:1", "name=a", "endpoint=tcp://h:1,replay=h:2", "endpoint=tcp://h:1,nmae=a"] {
            let error = parse::<Source>(wrong).expect_err(wrong).to_string();
            assert!(error.contains("tcp://10.0.0.1:5557"), "{error}");
        }
    }

    #[test]
    fn engines_in_a_file() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), Source::FILE_EXAMPLE).expect("written");
        assert_eq!(read_file::<Source>(file.path()).expect("the example")[0].name, "a");
        std::fs::write(file.path(), r#"[{"endpoint": "tcp://h:1"}, {"endpoint": "ipc:///x", "bind": true}]"#)
            .expect("written");
        let sources: Vec<Source> = read_file(file.path()).expect("two engines");
        assert_eq!((sources.len(), sources[1].bind), (2, true));
    }

    #[test]
    fn engines_at_an_address() {
        let ip = "fd00::1".parse().expect("an address");
        let source = Source::at("a".to_owned(), ip, &[1, 2]).expect("an engine");
        assert_eq!(
            (source.endpoint.as_str(), source.replay.as_deref()),
            ("tcp://[fd00::1]:1", Some("tcp://[fd00::1]:2"))
        );
        assert_eq!(Source::at("a".to_owned(), ip, &[1]).expect("an engine").replay, None);
        assert_eq!(Source::at("a".to_owned(), ip, &[1, 2, 3]), None);
    }
}
