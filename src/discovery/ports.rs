//! Ports of engines that are found by their addresses.

use std::net::{IpAddr, SocketAddr};

use super::engine::EngineSpec;
use kvcellar_block::error::{Error, Result};

/// Ports of engines that are found by their addresses.
pub(crate) struct Ports<'t> {
    /// The option that gives them, and its value.
    from: (&'static str, &'t str),
    pub(crate) numbers: Vec<u16>,
}

impl<'t> Ports<'t> {
    /// Reads the value of an option.
    ///
    /// # Errors
    /// [`Error::Config`].
    pub(crate) fn parse<E: EngineSpec>(field: &'static str, text: &'t str) -> Result<Self> {
        let from = (field, text);
        let numbers = text.split(':').map(|part| part.parse::<u16>().map_err(|_| Self::wrong::<E>(from)));
        Ok(Self { from, numbers: numbers.collect::<Result<_>>()? })
    }

    fn wrong<E: EngineSpec>((field, text): (&str, &str)) -> Error {
        Error::config(field, format!("`{text}` is no {}", E::PORTS), format!("Write e.g. {}", E::PORTS_DEFAULT))
    }

    /// The engine at an address, named by its first port there unless it has a name.
    ///
    /// # Errors
    /// [`Error::Config`]: it has another number of ports.
    pub(crate) fn engine<E: EngineSpec>(&self, name: Option<String>, ip: IpAddr) -> Result<E> {
        let first = self.numbers.first().copied().unwrap_or_default();
        let name = name.unwrap_or_else(|| SocketAddr::new(ip, first).to_string());
        E::at(name, ip, &self.numbers).ok_or_else(|| Self::wrong::<E>(self.from))
    }
}
