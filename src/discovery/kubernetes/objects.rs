//! Parts of objects, read into types of our own that have the few fields which matter. The types of
//! whole pods would make the program larger by megabytes of code that reads fields which nobody
//! asks for.

use kube::api::DynamicObject;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

/// Reads the part `name` of an object, which may not be there: it is empty then.
///
/// # Errors
/// Why it cannot be understood.
pub(crate) fn part<P: DeserializeOwned>(object: &DynamicObject, name: &str) -> Result<P, String> {
    let part = object.data.get(name).cloned().unwrap_or_else(|| Value::Object(Map::new()));
    serde_json::from_value(part).map_err(|error| format!("its {name} cannot be understood: {error}"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_part_is_read_and_may_be_absent() {
        let object = serde_json::from_value(json!({"metadata": {}, "spec": {"a": 1}})).expect("an object");
        let read = |name: &str| part::<Map<String, Value>>(&object, name).expect("understood").len();
        assert_eq!((read("spec"), read("status")), (1, 0));
        assert!(part::<u8>(&object, "spec").expect_err("no number").contains("its spec"));
    }
}
