//! Names that clients may use for models: each stands for one model, or is split between several.

use std::collections::BTreeMap;
use std::hash::{BuildHasher, BuildHasherDefault};

use xxhash_rust::xxh3::Xxh3;

use kvcellar_block::error::{Error, Result};

/// A model that a name stands for, and its share of the requests.
#[derive(Debug, Clone, PartialEq, Eq)]
struct ModelShare {
    model: String,
    /// In proportion to the weights of the name's other targets.
    weight: u32,
}

/// Names of models for clients.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Aliases {
    names: BTreeMap<String, Vec<ModelShare>>,
}

impl Aliases {
    /// Reads `NAME=MODEL`, or `NAME=MODEL@WEIGHT` for each of several models that share a name. An
    /// `@` that no whole number follows is part of the model's name.
    ///
    /// # Errors
    /// A text without a name or model, a name whose models have no weights or have all weight 0, a
    /// model named twice for one name.
    pub fn parse(texts: &[String]) -> Result<Self> {
        let wrong = |problem: String, remedy: &str| Error::config("alias", problem, remedy);
        let mut names = BTreeMap::<String, Vec<(ModelShare, bool)>>::new();
        for text in texts {
            let pair = text.split_once('=').filter(|(name, model)| !name.is_empty() && !model.is_empty());
            let Some((name, model)) = pair else {
                return Err(wrong(format!("`{text}` is no NAME=MODEL"), "Write e.g. chat=my/model"));
            };
            let weighted = model.rsplit_once('@').filter(|(model, _)| !model.is_empty());
            let weighted = weighted.and_then(|(model, weight)| Some((model, weight.parse::<u32>().ok()?)));
            let (model, weight) = weighted.unwrap_or((model, 1));
            let targets = names.entry(name.to_owned()).or_default();
            if targets.iter().any(|(target, _)| target.model == model) {
                return Err(wrong(format!("`{name}` names `{model}` twice"), "Name each model once"));
            }
            targets.push((ModelShare { model: model.to_owned(), weight }, weighted.is_some()));
        }
        let another = names.iter().find_map(|(name, targets)| {
            let target = targets.iter().find(|(target, _)| names.contains_key(&target.model))?;
            Some((name, &target.0.model))
        });
        if let Some((name, model)) = another {
            return Err(wrong(format!("`{name}` stands for `{model}`, which is an alias itself"), "Name a model"));
        }
        for (name, targets) in &names {
            if targets.len() > 1 && !targets.iter().all(|(_, has_weight)| *has_weight) {
                let remedy = "Name one of them, or give each its share: chat=MODEL@9 and chat=OTHER@1";
                return Err(wrong(format!("`{name}` stands for several models, not all with a weight"), remedy));
            }
            if targets.iter().all(|(target, _)| target.weight == 0) {
                return Err(wrong(format!("all models of `{name}` have weight 0"), "Give one a larger weight"));
            }
        }
        let plain = |targets: Vec<(ModelShare, bool)>| targets.into_iter().map(|(target, _)| target).collect();
        Ok(Self { names: names.into_iter().map(|(name, targets)| (name, plain(targets))).collect() })
    }

    /// The model that a name stands for, for one request; `None`: the name is no alias.
    ///
    /// Requests with the same `key` get the same model, so that a conversation stays with it.
    /// Models that `is_served` denies get no requests while another one of the name is served.
    pub fn model(&self, name: &str, key: u64, is_served: impl Fn(&str) -> bool) -> Option<&str> {
        let targets = self.names.get(name)?;
        let live = |target: &&ModelShare| target.weight > 0 && is_served(&target.model);
        let mut left: Vec<&ModelShare> = targets.iter().filter(live).collect();
        if left.is_empty() {
            left = targets.iter().filter(|target| target.weight > 0).collect();
        }
        // Each target draws its own number from the key, so that a target that joins or leaves
        // moves no request between the others.
        let draw = |target: &ModelShare| {
            let hash = BuildHasherDefault::<Xxh3>::default().hash_one((key, &target.model));
            let uniform = ((hash >> 11) as f64 + 0.5) / (1_u64 << 53) as f64;
            -uniform.ln() / f64::from(target.weight)
        };
        left.into_iter().min_by(|a, b| draw(a).total_cmp(&draw(b))).map(|target| target.model.as_str())
    }

    /// All names, each with the models that it stands for.
    pub fn iter(&self) -> impl Iterator<Item = (&str, impl Iterator<Item = &str>)> {
        self.names.iter().map(|(name, targets)| (name.as_str(), targets.iter().map(|target| target.model.as_str())))
    }

    /// There are none.
    pub fn is_empty(&self) -> bool {
        self.names.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(texts: &[&str]) -> Result<Aliases> {
        Aliases::parse(&texts.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn a_name_stands_for_one_model() {
        let aliases = parse(&["chat=my/model", "code=base@main"]).expect("aliases");
        assert_eq!(aliases.model("chat", 1, |_| true), Some("my/model"));
        assert_eq!(aliases.model("code", 1, |_| true), Some("base@main"), "a name may hold an @");
        assert_eq!(aliases.model("my/model", 1, |_| true), None);
    }

    #[test]
    fn what_is_no_alias_is_refused() {
        for (texts, said) in [
            (&["chat"][..], "no NAME=MODEL"),
            (&["=m"], "no NAME=MODEL"),
            (&["chat="], "no NAME=MODEL"),
            (&["chat=a", "chat=b"], "not all with a weight"),
            (&["chat=a@1", "chat=b"], "not all with a weight"),
            (&["chat=a@1", "chat=a@2"], "twice"),
            (&["chat=a@0", "chat=b@0"], "weight 0"),
            (&["chat=a", "talk=chat"], "an alias itself"),
        ] {
            let error = parse(texts).expect_err("refused").to_string();
            assert!(error.contains(said), "{texts:?}: {error}");
        }
    }

    #[test]
    fn a_split_follows_its_weights_and_keeps_what_belongs_together() {
        let aliases = parse(&["chat=a@7", "chat=b@3", "chat=off@0"]).expect("aliases");
        let model = |key: u64| aliases.model("chat", key, |_| true).expect("a model");
        let of_a = (0..10_000).filter(|key| model(*key) == "a").count();
        assert!((6_800..7_200).contains(&of_a), "{of_a} of 10000");
        assert!((0..10_000).all(|key| model(key) != "off" && model(key) == model(key)));
        // A model that leaves hands its own requests over, and moves no others.
        for key in 0..1_000 {
            assert_eq!(aliases.model("chat", key, |model| model != "b"), Some("a"));
            assert_eq!(aliases.model("chat", key, |_| false), Some(model(key)), "the engine's absence is the answer");
        }
        let wider = parse(&["chat=a@7", "chat=b@3", "chat=c@2"]).expect("aliases");
        let moved = |key: &u64| {
            let now = wider.model("chat", *key, |_| true).expect("a model");
            now != "c" && now != model(*key)
        };
        assert_eq!((0..10_000).filter(moved).count(), 0);
    }
}
