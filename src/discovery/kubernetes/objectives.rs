//! Objectives of pools, which give requests priorities: `InferenceObjective` of the Gateway API
//! inference extension.

use kube::api::{ApiResource, DynamicObject, GroupVersionKind};
use serde::Deserialize;

use super::objects::part;

/// Groups that have objectives: the extension's own, and llm-d's.
pub(crate) const GROUPS: [&str; 2] = ["inference.networking.x-k8s.io", "llm-d.ai"];

/// `InferenceObjective`, version 1 alpha 2, of one of [`GROUPS`].
pub(crate) fn objectives(group: &str) -> ApiResource {
    ApiResource::from_gvk(&GroupVersionKind::gvk(group, "v1alpha2", "InferenceObjective"))
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ObjectiveSpec {
    priority: Option<i32>,
    pool_ref: PoolRef,
}

#[derive(Deserialize)]
struct PoolRef {
    name: String,
}

/// Reads the priority that an objective has in a pool. `None`: it is another pool's.
///
/// # Errors
/// Why it has none.
pub(crate) fn priority(object: &DynamicObject, pool: &str) -> Result<Option<i32>, String> {
    let ObjectiveSpec { priority, pool_ref } = part(object, "spec")?;
    Ok((pool_ref.name == pool).then(|| priority.unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn object(spec: &Value) -> DynamicObject {
        serde_json::from_value(json!({"metadata": {"name": "a"}, "spec": spec})).expect("an object")
    }

    #[test]
    fn an_objective_is_of_one_pool() {
        let read = |spec: &Value| priority(&object(spec), "p");
        assert_eq!(read(&json!({"priority": -3, "poolRef": {"name": "p"}})), Ok(Some(-3)));
        assert_eq!(read(&json!({"poolRef": {"name": "p", "group": "g"}})), Ok(Some(0)), "none is 0");
        assert_eq!(read(&json!({"priority": 1, "poolRef": {"name": "q"}})), Ok(None));
        assert!(read(&json!({"priority": 1})).expect_err("of no pool").contains("poolRef"));
    }

    #[test]
    fn the_kind_is_named_as_the_api_server_names_it() {
        let kind = objectives(GROUPS[0]);
        let expected = ("inference.networking.x-k8s.io/v1alpha2".to_owned(), "inferenceobjectives".to_owned());
        assert_eq!((kind.api_version, kind.plural), expected);
    }
}
