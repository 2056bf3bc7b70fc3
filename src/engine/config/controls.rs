//! Per-request controls: `kv_transfer_params = {"kvcellar": {...}}`.

use serde_json::{Map, Value};

use super::{nearest, nvme, wrong};
use kvcellar_block::error::{Error, Result};

/// Nobody pins for longer.
const PIN_SECONDS_MAX: u64 = 366 * 86_400;

/// What one request asked of the cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Controls {
    /// Keep this request's blocks.
    pub store: bool,
    /// Serve this request from our tiers.
    pub load: bool,
    /// Load at most this many tokens beyond vLLM's own hit.
    pub max_load_tokens: Option<u32>,
    /// Keep its blocks in memory for so many seconds.
    pub pin_s: Option<u64>,
    /// Whose the request is, by a name of `tenants`.
    pub tenant: Option<Box<str>>,
    /// Forget everything of requests with this request's salt.
    pub forget: bool,
}

impl Default for Controls {
    fn default() -> Self {
        Self { store: true, load: true, max_load_tokens: None, pin_s: None, tenant: None, forget: false }
    }
}

/// Keys and what to write, for messages.
pub(crate) const KEYS: &[(&str, &str)] = &[
    ("store", "true or false"),
    ("load", "true or false"),
    ("forget", "true or false"),
    ("max_load_tokens", "a whole number of tokens, 0 or more"),
    ("pin", "a time such as \"30m\" or \"2h\", a year at most"),
    ("tenant", "a name of `tenants`"),
];

impl Controls {
    /// Parses the object under the key `kvcellar`.
    ///
    /// # Errors
    /// [`Error::Config`] naming the key at fault.
    pub fn parse(json: &str) -> Result<Self> {
        let object: Map<String, Value> = serde_json::from_str(json).map_err(|error| {
            Error::config(
                "kv_transfer_params.kvcellar",
                format!("not a JSON object ({error})"),
                "Write {\"store\": false}",
            )
        })?;
        let mut controls = Self::default();
        for (key, value) in &object {
            match key.as_str() {
                "store" => controls.store = value.as_bool().ok_or_else(|| wrong(key, value))?,
                "forget" => controls.forget = value.as_bool().ok_or_else(|| wrong(key, value))?,
                "load" => controls.load = value.as_bool().ok_or_else(|| wrong(key, value))?,
                "max_load_tokens" => {
                    let tokens = value.as_u64().and_then(|tokens| u32::try_from(tokens).ok());
                    controls.max_load_tokens = Some(tokens.ok_or_else(|| wrong(key, value))?);
                }
                "pin" => {
                    let seconds = value.as_str().and_then(nvme::seconds).filter(|seconds| *seconds <= PIN_SECONDS_MAX);
                    controls.pin_s = Some(seconds.ok_or_else(|| wrong(key, value))?);
                }
                "tenant" => controls.tenant = Some(value.as_str().ok_or_else(|| wrong(key, value))?.into()),
                _ => return Err(Error::config(key, "is not a known key", nearest(key, KEYS))),
            }
        }
        Ok(controls)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn controls_are_read_and_refused() {
        let read = Controls::parse(r#"{"store": false, "max_load_tokens": 32, "forget": true}"#).expect("valid");
        assert_eq!(read, Controls { store: false, max_load_tokens: Some(32), forget: true, ..Controls::default() });
        assert_eq!(Controls::parse(r#"{"pin": "2h"}"#).expect("valid").pin_s, Some(7_200));
        for wrong in ["7200", "\"2\"", "\"0s\"", "\"9999d\"", "\"18446744073709551615d\""] {
            let text = Controls::parse(&format!("{{\"pin\": {wrong}}}")).expect_err(wrong).to_string();
            assert!(text.starts_with("pin") && text.contains("Write a time"), "{text}");
        }
        let tenant = Controls::parse(r#"{"tenant": "acme"}"#).expect("valid").tenant;
        assert_eq!(tenant.as_deref(), Some("acme"));
        assert!(Controls::parse(r#"{"tenant": 1}"#).expect_err("no text").to_string().contains("a name of `tenants`"));
        assert!(Controls::parse(r#"{"stor": false}"#).expect_err("unknown").to_string().contains("`store`"));
        assert!(
            Controls::parse(r#"{"max_load_tokens": -1}"#).expect_err("range").to_string().contains("max_load_tokens")
        );
    }
}
