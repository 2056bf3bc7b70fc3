//! How an engine is written: `name=value,...` on the command line, an object with the same fields
//! in a JSON file.

use std::net::IpAddr;
use std::path::Path;

use serde::Deserialize;
use serde::de::{DeserializeOwned, Deserializer};
use serde_json::{Map, Value as Json};

use super::pod_notes::PodNotes;
use kvcellar_block::error::{Error, Result};

/// An engine as one command describes it. Its fields are those of users: `Deserialize` has to
/// refuse unknown ones.
pub trait EngineSpec: DeserializeOwned + PartialEq {
    /// The field that has to be there; text without `=` is its value.
    const ADDRESS: &'static str;
    /// Fields that are true or false.
    const FLAGS: &'static [&'static str];
    /// Says how an engine is written, in the help of `--engine`.
    const HELP: &'static str;
    /// An engine that can be written so.
    const EXAMPLE: &'static str;
    /// A file that can be written so.
    const FILE_EXAMPLE: &'static str;
    /// Ports of an engine that is found by its address, and what each is for.
    const PORTS: &'static str;
    /// Such ports, unless others are given.
    const PORTS_DEFAULT: &'static str;
    /// Requests to such engines have priorities, which the objectives of a pool name.
    const HAS_PRIORITIES: bool = false;

    /// This engine with what was left out filled in.
    ///
    /// # Errors
    /// [`Error::Config`].
    fn checked(self) -> Result<Self>;

    /// The engine at an address. `None`: it has another number of ports.
    fn at(name: String, ip: IpAddr, ports: &[u16]) -> Option<Self>;

    /// An engine of a pool: where it answers, publishes events and replays them.
    fn of_pool(name: String, ip: IpAddr, target: u16, events: (u16, Option<u16>)) -> Self;

    /// This engine with what its pod says of it.
    #[must_use]
    fn noted(self, _notes: PodNotes) -> Self {
        self
    }

    /// Its name, which tells it apart.
    fn name(&self) -> &str;
}

/// The remedy for an engine that cannot be understood.
fn remedy<E: EngineSpec>() -> String {
    format!("Write e.g. {}", E::EXAMPLE)
}

fn wrong<E: EngineSpec>(problem: String) -> Error {
    Error::config("engine", problem, remedy::<E>())
}

/// An engine as on the command line: `name=value,...` with each name once, or its address alone.
///
/// # Errors
/// [`Error::Config`].
pub fn parse<E: EngineSpec>(text: &str) -> Result<E> {
    let mut fields = Map::new();
    if text.contains('=') {
        for part in text.split(',') {
            let (name, value) = part.split_once('=').ok_or_else(|| wrong::<E>(format!("`{part}` has no `=`")))?;
            let (name, value) = (name.trim(), value.trim());
            let value = if E::FLAGS.contains(&name) { (value == "true").into() } else { value.into() };
            if fields.insert(name.to_owned(), value).is_some() {
                return Err(wrong::<E>(format!("`{name}` stands twice")));
            }
        }
    } else {
        fields.insert(E::ADDRESS.to_owned(), text.into());
    }
    let spec: E = serde_json::from_value(Json::Object(fields)).map_err(|error| wrong::<E>(error.to_string()))?;
    spec.checked()
}

/// The engines in a JSON file: a list of objects with the fields of the command line.
///
/// # Errors
/// [`Error::Io`], [`Error::Config`].
pub fn read_file<E: EngineSpec>(path: &Path) -> Result<Vec<E>> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| Error::io("reading", path, error, "Name a file with a JSON list of engines"))?;
    let specs: Vec<E> = serde_json::from_str(&text).map_err(|error| {
        Error::config("engines-file", error.to_string(), format!("Write a list like {}", E::FILE_EXAMPLE))
    })?;
    specs.into_iter().map(E::checked).collect()
}

/// Refuses what is no address of a socket for events, in the field `field` of an engine.
///
/// # Errors
/// [`Error::Config`].
pub fn events_address<E: EngineSpec>(field: &str, address: &str) -> Result<()> {
    if ["tcp://", "ipc://"].iter().any(|scheme| address.starts_with(scheme)) {
        return Ok(());
    }
    Err(Error::config(field, format!("`{address}` has no scheme"), remedy::<E>()))
}

/// Reads a name that may be left out or `null`: both are the empty one.
///
/// # Errors
/// Those of the deserializer.
pub fn name_or_empty<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<String, D::Error> {
    Option::<String>::deserialize(deserializer).map(Option::unwrap_or_default)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// An engine with one field of each kind.
    #[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
    #[serde(deny_unknown_fields)]
    pub(crate) struct Plain {
        #[serde(default, deserialize_with = "name_or_empty")]
        name: String,
        events: String,
        #[serde(default)]
        open: bool,
    }

    impl EngineSpec for Plain {
        const ADDRESS: &'static str = "events";
        const FLAGS: &'static [&'static str] = &["open"];
        const HELP: &'static str = "An engine";
        const EXAMPLE: &'static str = "events=tcp://10.0.0.1:1,name=a,open=true";
        const FILE_EXAMPLE: &'static str = r#"[{"events": "tcp://10.0.0.1:1"}]"#;
        const PORTS: &'static str = "port[:other]";
        const PORTS_DEFAULT: &'static str = "1";

        fn checked(mut self) -> Result<Self> {
            events_address::<Self>("events", &self.events)?;
            if self.name.is_empty() {
                self.name.clone_from(&self.events);
            }
            Ok(self)
        }

        fn at(name: String, ip: IpAddr, ports: &[u16]) -> Option<Self> {
            let [port] = ports else { return None };
            Some(Self { name, events: format!("tcp://{}", std::net::SocketAddr::new(ip, *port)), open: false })
        }

        fn of_pool(name: String, ip: IpAddr, target: u16, (events, replay): (u16, Option<u16>)) -> Self {
            let events = format!("tcp://{}/{target}/{replay:?}", std::net::SocketAddr::new(ip, events));
            Self { name, events, open: false }
        }

        fn noted(self, notes: PodNotes) -> Self {
            let PodNotes { role, draining, rank } = notes;
            Self { events: format!("{} {role:?} {rank:?}", self.events), open: !draining, ..self }
        }

        fn name(&self) -> &str {
            &self.name
        }
    }

    #[test]
    fn engines_on_the_command_line() {
        let engine: Plain = parse("events=tcp://h:1, name=a,open=true").expect("an engine");
        assert_eq!((engine.name.as_str(), engine.events.as_str(), engine.open), ("a", "tcp://h:1", true));
        assert_eq!(parse::<Plain>("tcp://h:1").expect("an address").name, "tcp://h:1");
        assert!(!parse::<Plain>("events=ipc:///x,open=yes").expect("an engine").open);
        let wrong = [
            ("h:1", "no scheme"),
            ("name=a", "events"),
            ("events=tcp://h:1,events=tcp://h:1", "twice"),
            ("events=tcp://h:1,nmae=a", "nmae"),
            ("events=tcp://h:1,a", "no `=`"),
        ];
        for (text, problem) in wrong {
            let error = parse::<Plain>(text).expect_err(text).to_string();
            assert!(error.contains(problem) && error.contains(Plain::EXAMPLE), "{text}: {error}");
        }
    }

    #[test]
    fn engines_in_a_file() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let write = |text: &str| std::fs::write(file.path(), text).expect("written");
        write(r#"[{"events": "tcp://h:1", "name": null}, {"events": "ipc:///x", "open": true}]"#);
        let found: Vec<Plain> = read_file(file.path()).expect("two engines");
        assert_eq!((found[0].name.as_str(), found[1].open), ("tcp://h:1", true));
        write(r#"[{"events": "tcp://h:1", "colour": 1}]"#);
        assert!(read_file::<Plain>(file.path()).expect_err("an unknown field").to_string().contains("colour"));
    }
}
