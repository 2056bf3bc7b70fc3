//! The namespace: a fingerprint of everything that makes KV bytes interchangeable.

use serde_json::Value;
use xxhash_rust::xxh3::xxh3_128;

use crate::config::Config;
use crate::pool::header::FORMAT_VERSION;
use kvcellar_block::error::{Error, Result};
use kvcellar_block::{Grouping, SlotGeometry};

/// The one fact that is told to people only: where the model lay. A copy of it elsewhere is the
/// same model.
const LABEL: &str = "model";

/// The facts with what the engine itself adds, and their fingerprint.
///
/// `facts`: a JSON object of what the connector knows (`python/kvcellar/facts.py`).
///
/// # Errors
/// [`Error::Config`] when `facts` is no JSON object.
pub fn fingerprint(
    facts: &str,
    grouping: &Grouping,
    geometry: &SlotGeometry,
    config: &Config,
) -> Result<(String, [u8; 16])> {
    let mut facts: Value = serde_json::from_str(facts)
        .ok()
        .filter(Value::is_object)
        .ok_or_else(|| Error::config("facts", "not a JSON object", "This is a bug in the connector"))?;
    facts["format"] = FORMAT_VERSION.into();
    facts["salt"] = config.namespace_salt.as_str().into();
    facts["groups"] = serde_json::to_value(grouping).unwrap_or_default();
    facts["slot"] = serde_json::to_value(geometry).unwrap_or_default();
    let text = facts.to_string();
    if let Some(facts) = facts.as_object_mut() {
        facts.remove(LABEL);
    }
    // Objects keep the order in which they were written: equal facts have to give equal text.
    facts.sort_all_objects();
    let fingerprint = xxh3_128(facts.to_string().as_bytes()).to_be_bytes();
    Ok((text, fingerprint))
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvcellar_block::geometry::RankBytes;
    use kvcellar_block::{GroupKind, GroupSpec};

    fn of(facts: &str) -> (String, [u8; 16]) {
        let group =
            GroupSpec { kind: GroupKind::Full, kind_name: "full_attention".into(), block_tokens: 16, eagle: false };
        let grouping = Grouping { groups: vec![group], hash_tokens: 16, hit_tokens: 16 };
        let rank = RankBytes { block_bytes: vec![1000], replica_of: vec![None] };
        let geometry = SlotGeometry::lay_out(&grouping, &[rank]).expect("it fits");
        fingerprint(facts, &grouping, &geometry, &Config::default()).expect("an object")
    }

    #[test]
    fn where_a_model_lies_is_told_to_people_and_does_not_count() {
        let (text, here) = of(r#"{"model":"/here","parts":{"weights":"a"}}"#);
        let (_, there) = of(r#"{"parts":{"weights":"a"},"model":"/there"}"#);
        let (_, other) = of(r#"{"model":"/here","parts":{"weights":"b"}}"#);
        assert!(text.contains("/here") && here == there && here != other);
    }
}
