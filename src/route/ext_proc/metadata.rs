//! Envoy's dynamic metadata: what is read of it, and what is told in it.

use envoy_types::pb::envoy::config::core::v3::Metadata;
use envoy_types::pb::google::protobuf::value::Kind;
use envoy_types::pb::google::protobuf::{ListValue, Struct, Value};

use crate::see::{Considered, Decision};

/// Where the gateway reads the address, as a header and in the metadata of `envoy.lb`.
pub(super) const DESTINATION: &str = "x-gateway-destination-endpoint";
/// Namespace and key of the addresses that alone may take a request.
pub(super) const SUBSET: (&str, &str) = ("envoy.lb.subset_hint", "x-gateway-destination-endpoint-subset");
/// Namespace and key of the address that a request went to.
pub(super) const SERVED: (&str, &str) = ("envoy.lb", "x-gateway-destination-endpoint-served");
/// Namespace of what the decision was made from: `envoy.lb` has the address alone.
const DECISION: &str = "kvcellar";

/// What is told of a decision. `places`: the chosen address, then those to try if it fails.
/// `in_full`: with the engines that were weighed, which costs several microseconds.
pub(super) fn of(places: String, decision: &Decision, in_full: bool) -> Struct {
    let mut decided = fields([
        ("engine", string(decision.engine.clone())),
        ("prompt_tokens", number(decision.prompt_tokens)),
        ("predicted_cached", number(decision.predicted_cached)),
    ]);
    if in_full {
        let values = decision.considered.iter().map(weighed).collect();
        let list = Value { kind: Some(Kind::ListValue(ListValue { values })) };
        decided.fields.insert("considered".to_owned(), list);
    }
    fields([(SERVED.0, record(fields([(DESTINATION, string(places))]))), (DECISION, record(decided))])
}

fn weighed(engine: &Considered) -> Value {
    record(fields([
        ("engine", string(engine.engine.clone())),
        ("total", number(engine.total)),
        ("held_tokens", number(engine.held_tokens)),
    ]))
}

fn number(number: impl Into<f64>) -> Value {
    Value { kind: Some(Kind::NumberValue(number.into())) }
}

fn string(text: String) -> Value {
    Value { kind: Some(Kind::StringValue(text)) }
}

fn fields<const COUNT: usize>(named: [(&str, Value); COUNT]) -> Struct {
    Struct { fields: named.into_iter().map(|(name, value)| (name.to_owned(), value)).collect() }
}

fn record(fields: Struct) -> Value {
    Value { kind: Some(Kind::StructValue(fields)) }
}

/// The text at a place of Envoy's metadata; a list's texts with commas between.
pub(super) fn text(metadata: Option<&Metadata>, (space, name): (&str, &str)) -> Option<String> {
    match metadata?.filter_metadata.get(space)?.fields.get(name)?.kind.as_ref()? {
        Kind::StringValue(text) => Some(text.clone()),
        Kind::ListValue(list) => {
            let texts = list.values.iter().filter_map(|value| match &value.kind {
                Some(Kind::StringValue(text)) => Some(text.as_str()),
                _ => None,
            });
            Some(texts.collect::<Vec<_>>().join(","))
        }
        _ => None,
    }
}
