//! A scheduling profile: its plugins, and how engines are weighed by them.

use std::collections::{BTreeMap, BTreeSet};

use super::file::Profile;
use super::plugins::{Part, PluginKind};
use super::wrong;
use crate::choose::{Pick, Policy};
use crate::router::Mode;
use crate::scorers::Scorer;
use kvcellar_block::error::Result;

/// The plugins that a profile uses, each with its weight.
pub(super) struct Used<'f>(Vec<(&'f str, f64)>);

impl<'f> Used<'f> {
    /// All that there are.
    pub(super) fn all(found: &'f BTreeMap<String, Part>) -> Self {
        Self(found.keys().map(|name| (name.as_str(), 1.0)).collect())
    }

    /// Those of a profile.
    pub(super) fn of(profile: &'f Profile) -> Self {
        Self(profile.plugins.iter().map(|it| (it.plugin_ref.as_str(), it.weight.unwrap_or(1.0))).collect())
    }
}

/// What a profile makes of engines.
#[derive(Debug)]
pub(super) struct Weighed {
    weights: Vec<(Scorer, f64)>,
    pick: Pick,
    /// Where prefixes are looked up.
    pub(super) mode: Mode,
    /// Engines named beside the chosen one.
    pub(super) fallbacks: usize,
    /// Header that names a session.
    pub(super) session_header: Option<String>,
}

impl Weighed {
    /// Reads a profile.
    ///
    /// # Errors
    /// Names the plugin.
    pub(super) fn read(
        used: Used<'_>,
        found: &BTreeMap<String, Part>,
        producers: &BTreeMap<String, Mode>,
    ) -> Result<Self> {
        let mut made =
            Self { weights: Vec::new(), pick: Pick::Best, mode: Mode::None, fallbacks: 0, session_header: None };
        let mut seen = BTreeSet::new();
        let mut picks = None;
        for (name, weight) in used.0 {
            let part = found.get(name).filter(|_| seen.insert(name)).ok_or_else(|| {
                wrong(
                    format!("a profile names `{name}`, which is no plugin or stands twice"),
                    "List it once under plugins",
                )
            })?;
            if !weight.is_finite() || weight < 0.0 {
                return Err(wrong(format!("the weight of `{name}` is {weight}"), "Write a number of 0 or more"));
            }
            match &part.kind {
                PluginKind::Pick { how, fallbacks } => {
                    if picks.replace(name).is_some() {
                        return Err(wrong("there are two pickers in a profile", "Keep one of them"));
                    }
                    (made.pick, made.fallbacks) = (*how, *fallbacks);
                }
                PluginKind::Prefix(lookup) => {
                    let mode = lookup.mode(name, producers)?;
                    if made.mode != Mode::None {
                        return Err(wrong("there are two prefix scorers", "Keep one of them"));
                    }
                    made.mode = mode;
                    made.weights.push((Scorer::Prefix, weight));
                }
                PluginKind::Scorer(scorer) => made.weights.push((*scorer, weight)),
                PluginKind::Session(header) => {
                    made.session_header = Some(header.clone());
                    made.weights.push((Scorer::Session, weight));
                }
                PluginKind::Nothing
                | PluginKind::Producer(_)
                | PluginKind::Source(_)
                | PluginKind::Decider(_)
                | PluginKind::Handler(_) => {}
            }
        }
        Ok(made)
    }

    /// How engines are chosen. Without a scorer, at random.
    pub(super) fn policy(&self) -> Policy {
        let pick = if self.weights.is_empty() { Pick::Random } else { self.pick };
        Policy::Scorers(self.weights.clone(), pick)
    }
}
