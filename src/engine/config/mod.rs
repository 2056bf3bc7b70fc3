//! Typed configuration of one engine: `kv_connector_extra_config` and per-request controls.
//!
//! Owns: the list of keys, their types, units and defaults. Promises: an unknown key or a value of
//! the wrong type is an error that names the key and the nearest known one. Does not read files or
//! the environment.

pub mod controls;
pub mod nvme;
pub mod policy;
pub mod size;
pub mod tenants;

use std::path::PathBuf;

use serde_json::{Map, Value};

use kvcellar_block::error::{Error, Result};

pub use controls::Controls;
pub use nvme::NvmeConfig;
pub use policy::PolicyName;
pub use tenants::TenantList;

/// What to do with a model that has KV cache groups this version cannot keep.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UnsupportedGroups {
    /// Refuse to start, naming group and kind.
    Error,
    /// Start, and answer every lookup with "nothing".
    Bypass,
}

/// What `reset_cache` means, which vLLM calls when weights may have changed, and also at pause and
/// sleep.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnReset {
    /// Everything stored is dropped, and what follows belongs to this process alone.
    #[default]
    Erase,
    /// Nothing: the user promises that weights never change in a running engine.
    Keep,
}

/// Configuration of one engine. Sizes are bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "each is a key that users write as true or false")]
pub struct Config {
    /// Wanted size of the dram tier, capped by what the machine has.
    pub dram_bytes: u64,
    /// The user wrote the size; a default may be lowered in silence, a wish may not.
    pub dram_explicit: bool,
    /// Directory of the shared-memory file system that holds the pool.
    pub pool_dir: PathBuf,
    /// Keep the pool file when the engine stops, for the next start to adopt.
    pub keep_pool: bool,
    /// Threads of each worker's host copier; `None`: chosen from the machine.
    pub copy_threads: Option<usize>,
    /// See [`UnsupportedGroups`].
    pub unsupported_groups: UnsupportedGroups,
    /// Leave vLLM's `kv_load_failure_policy` alone, so that a failed load may fail its request.
    pub strict_load_failure: bool,
    /// Emit `KVEvents` (they only leave the process when vLLM's own publisher is on).
    pub events: bool,
    /// Keep KV although prefix caching is off in vLLM by the user's own choice.
    pub without_prefix_caching: bool,
    /// Engines on this machine that share the sizes of both tiers; `None`: as many as vLLM says.
    pub local_engines: Option<u32>,
    /// Extra text that goes into the namespace's fingerprint.
    pub namespace_salt: String,
    /// Debug mode: compare the bytes that arrive with the bytes that were offloaded.
    pub verify_loads: bool,
    /// See [`OnReset`].
    pub on_reset: OnReset,
    /// Which blocks both tiers keep.
    pub policy: PolicyName,
    /// Who shares both tiers.
    pub tenants: TenantList,
    /// The nvme tier.
    pub nvme: NvmeConfig,
    /// Where the engine writes its operation log, if anywhere. Hashes and counts, never tokens.
    pub trace_file: Option<PathBuf>,
    /// Where requests are recorded for `kvcellar simulate`, if anywhere. Hashes and lengths, never
    /// tokens.
    pub record_trace: Option<PathBuf>,
}

/// Default size of the dram tier: modest, so that a first start never surprises a machine.
pub const DRAM_BYTES_DEFAULT: u64 = 4 << 30;

/// All keys with the type a user must write, for messages.
pub const KEYS: &[(&str, &str)] = &[
    ("dram_size", "a size such as \"4GiB\" or a positive number of bytes"),
    ("pool_dir", "an absolute path"),
    ("keep_pool", "true or false"),
    ("copy_threads", "a whole number from 1 to 64"),
    ("unsupported_groups", "\"error\" or \"bypass\""),
    ("strict_load_failure", "true or false"),
    ("without_prefix_caching", "true or false"),
    ("local_engines", "a whole number from 1 to 1024"),
    ("events", "true or false"),
    ("namespace_salt", "a string"),
    ("verify_loads", "true or false"),
    ("on_reset", "\"erase\" or \"keep\""),
    ("policy", "\"lru\", \"s3fifo\", \"arc\", \"lrfu\" or \"adaptive\""),
    ("tenants", "tenants such as {\"acme\": {\"guaranteed\": \"20%\", \"limit\": \"60%\"}}"),
    ("trace_file", "an absolute path"),
    ("record_trace", "an absolute path"),
];

impl Default for Config {
    fn default() -> Self {
        Self {
            dram_bytes: DRAM_BYTES_DEFAULT,
            dram_explicit: false,
            pool_dir: PathBuf::from("/dev/shm"),
            keep_pool: true,
            copy_threads: None,
            unsupported_groups: UnsupportedGroups::Bypass,
            strict_load_failure: false,
            without_prefix_caching: false,
            local_engines: None,
            events: true,
            namespace_salt: String::new(),
            verify_loads: false,
            on_reset: OnReset::Erase,
            policy: PolicyName::Lru,
            tenants: TenantList::default(),
            nvme: NvmeConfig::default(),
            trace_file: None,
            record_trace: None,
        }
    }
}

impl Config {
    /// Parses the JSON object a user wrote as `kv_connector_extra_config`.
    ///
    /// # Errors
    /// [`Error::Config`] for text that is no JSON object, an unknown key, or a value of the wrong
    /// type or range.
    pub fn parse(json: &str) -> Result<Self> {
        let object: Map<String, Value> = serde_json::from_str(json).map_err(|error| {
            Error::config(
                "kv_connector_extra_config",
                format!("not a JSON object ({error})"),
                "Write {\"dram_size\": \"4GiB\"}",
            )
        })?;
        let mut config = Self::default();
        for (key, value) in &object {
            config.set(key, value)?;
        }
        config.nvme.check()?;
        Ok(config)
    }

    fn set(&mut self, key: &str, value: &Value) -> Result<()> {
        match key {
            "dram_size" => {
                self.dram_bytes = size::parse(key, value)?;
                self.dram_explicit = true;
            }
            "pool_dir" => self.pool_dir = absolute_path(key, value)?,
            "keep_pool" => self.keep_pool = boolean(key, value)?,
            "copy_threads" => self.copy_threads = Some(thread_count(key, value)?),
            "unsupported_groups" => {
                self.unsupported_groups = match value.as_str() {
                    Some("error") => UnsupportedGroups::Error,
                    Some("bypass") => UnsupportedGroups::Bypass,
                    _ => return Err(wrong(key, value)),
                };
            }
            "strict_load_failure" => self.strict_load_failure = boolean(key, value)?,
            "without_prefix_caching" => self.without_prefix_caching = boolean(key, value)?,
            "local_engines" => {
                let engines = value.as_u64().filter(|engines| (1..=1024).contains(engines));
                self.local_engines = Some(engines.ok_or_else(|| wrong(key, value))? as u32);
            }
            "events" => self.events = boolean(key, value)?,
            "namespace_salt" => value.as_str().ok_or_else(|| wrong(key, value))?.clone_into(&mut self.namespace_salt),
            "verify_loads" => self.verify_loads = boolean(key, value)?,
            "on_reset" => {
                self.on_reset = match value.as_str() {
                    Some("erase") => OnReset::Erase,
                    Some("keep") => OnReset::Keep,
                    _ => return Err(wrong(key, value)),
                };
            }
            "policy" => {
                self.policy = value.as_str().and_then(PolicyName::named).ok_or_else(|| wrong(key, value))?;
            }
            "tenants" => self.tenants = TenantList::parse(key, value)?,
            "trace_file" => self.trace_file = Some(absolute_path(key, value)?),
            "record_trace" => self.record_trace = Some(absolute_path(key, value)?),
            _ if self.nvme.set(key, value)? => {}
            _ => return Err(unknown(key)),
        }
        Ok(())
    }
}

fn boolean(key: &str, value: &Value) -> Result<bool> {
    value.as_bool().ok_or_else(|| wrong(key, value))
}

fn thread_count(key: &str, value: &Value) -> Result<usize> {
    match value.as_u64() {
        Some(count @ 1..=64) => Ok(count as usize),
        _ => Err(wrong(key, value)),
    }
}

fn absolute_path(key: &str, value: &Value) -> Result<PathBuf> {
    match value.as_str().map(PathBuf::from) {
        Some(path) if path.is_absolute() => Ok(path),
        _ => Err(wrong(key, value)),
    }
}

/// The error for a value of the wrong type or range.
pub(crate) fn wrong(key: &str, value: &Value) -> Error {
    let wanted = KEYS
        .iter()
        .chain(nvme::KEYS)
        .chain(controls::KEYS)
        .find(|(name, _)| *name == key)
        .map_or("another value", |(_, wanted)| *wanted);
    Error::config(key, format!("{value} is not valid"), format!("Write {wanted}"))
}

fn unknown(key: &str) -> Error {
    Error::config(key, "is not a known key", nearest(key, &[KEYS, nvme::KEYS].concat()))
}

/// "Did you mean X? Known keys: ...".
pub(crate) fn nearest(key: &str, known: &[(&str, &str)]) -> String {
    let names: Vec<&str> = known.iter().map(|(name, _)| *name).collect();
    let best = names.iter().max_by(|a, b| strsim::jaro_winkler(key, a).total_cmp(&strsim::jaro_winkler(key, b)));
    let guess = best
        .filter(|name| strsim::jaro_winkler(key, name) > 0.7)
        .map_or(String::new(), |name| format!("Did you mean `{name}`? "));
    format!("{guess}Known keys: {}", names.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(json: &str) -> String {
        Config::parse(json).expect_err("must be refused").to_string()
    }

    #[test]
    fn empty_object_gives_the_defaults() {
        assert_eq!(Config::parse("{}").expect("valid"), Config::default());
    }

    #[test]
    fn every_documented_key_is_accepted() {
        let json = r#"{"dram_size":"512MiB","pool_dir":"/dev/shm","keep_pool":false,"copy_threads":3,"unsupported_groups":"bypass",
            "strict_load_failure":true,"events":false,"without_prefix_caching":true,"local_engines":4,"namespace_salt":"x","verify_loads":true,"on_reset":"keep","policy":"adaptive","tenants":{"a":{"guaranteed":"10%"}},"trace_file":"/tmp/t","record_trace":"/tmp/r",
            "nvme_dir":"/disk","nvme_size":"1GiB","nvme_reserve":"2GiB","nvme_engine":"threads","nvme_staging":"off","nvme_admission":"reused",
            "nvme_write_budget":"2TB/day",
            "write_through":true,"clean_percent":25,"load_policy":"auto","retention":"24h"}"#;
        let config = Config::parse(json).expect("valid");
        assert_eq!(config.dram_bytes, 512 << 20);
        assert_eq!(config.copy_threads, Some(3));
        let object: Map<String, Value> = serde_json::from_str(json).expect("json");
        assert_eq!(config.nvme.retention_s, Some(86_400));
        assert_eq!(object.len(), KEYS.len() + nvme::KEYS.len(), "this test names every key");
    }

    #[test]
    fn unknown_key_names_the_nearest() {
        let text = message(r#"{"dram_sise": "1GiB"}"#);
        assert!(text.contains("dram_sise") && text.contains("Did you mean `dram_size`?"), "{text}");
    }

    #[test]
    fn wrong_values_name_the_key_and_what_to_write() {
        for (json, key) in [
            (r#"{"dram_size": -1}"#, "dram_size"),
            (r#"{"dram_size": "many"}"#, "dram_size"),
            (r#"{"dram_size": 0}"#, "dram_size"),
            (r#"{"dram_size": 1.5}"#, "dram_size"),
            (r#"{"keep_pool": "yes"}"#, "keep_pool"),
            (r#"{"copy_threads": 0}"#, "copy_threads"),
            (r#"{"pool_dir": "relative"}"#, "pool_dir"),
            (r#"{"unsupported_groups": "some"}"#, "unsupported_groups"),
            (r#"{"local_engines": 0}"#, "local_engines"),
            (r#"{"without_prefix_caching": 1}"#, "without_prefix_caching"),
            (r#"{"on_reset": true}"#, "on_reset"),
            (r#"{"nvme_dir": "relative"}"#, "nvme_dir"),
            (r#"{"nvme_size": "1GiB"}"#, "nvme_dir"),
            (r#"{"load_policy": "maybe"}"#, "load_policy"),
            (r#"{"clean_percent": 101}"#, "clean_percent"),
            (r#"{"retention": "24"}"#, "retention"),
        ] {
            let text = message(json);
            assert!(text.starts_with(key) && text.contains("Write "), "{json}: {text}");
        }
        assert!(message("[]").contains("kv_connector_extra_config"));
    }
}
