//! A router's peers as it knows them: who they are, what they are told, how it stands with each.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::follower::PeerFault;
use super::journal::Journal;
use super::options::PeerOptions;
use crate::upstream::Upstream;
use kvcellar_block::error::Result;

/// The names of all states of peers, in metrics.
pub const PEER_STATES: [&str; 4] = ["sharing", "silent", "refused", "self"];

/// How it stands with one peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum PeerState {
    /// What it has in flight counts.
    Sharing(u64),
    /// It does not answer.
    Silent(String),
    /// What it says is not taken.
    Refused(PeerFault),
    /// It is this router, or one that is shared with under another address.
    Same(&'static str),
}

impl PeerState {
    fn name(&self) -> &'static str {
        match self {
            Self::Sharing(_) => "sharing",
            Self::Silent(_) => "silent",
            Self::Refused(_) => "refused",
            Self::Same(_) => "self",
        }
    }

    fn text(&self) -> String {
        match self {
            Self::Sharing(_) => self.name().to_owned(),
            Self::Silent(why) => format!("silent: {why}"),
            Self::Refused(fault) => format!("refused: {fault}"),
            Self::Same(why) => (*why).to_owned(),
        }
    }
}

/// A router's peers.
#[derive(Debug)]
pub struct Peers {
    /// What this router tells them.
    pub journal: Arc<Journal>,
    pub(super) upstream: Upstream,
    pub(super) urls: Vec<String>,
    pub(super) name: Option<String>,
    states: Mutex<BTreeMap<String, PeerState>>,
}

impl Peers {
    /// Those that options name; `None` where they name nobody. `upstream`: how engines are reached.
    ///
    /// # Errors
    /// Those of the options, and of the file with the key.
    pub fn new(options: &PeerOptions, upstream: &Upstream) -> Result<Option<Self>> {
        let urls = options.urls()?;
        if urls.is_empty() && options.name.is_none() {
            return Ok(None);
        }
        // 0 stands for nobody.
        let journal = Arc::new(Journal::new(fastrand::Rng::new().u64(1..)));
        let upstream = upstream.clone().with_key("peer-key", options.peer_key.as_deref())?;
        Ok(Some(Self { journal, upstream, urls, name: options.name.clone(), states: Mutex::default() }))
    }

    fn states_now(&self) -> MutexGuard<'_, BTreeMap<String, PeerState>> {
        self.states.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How it stands with each, for people.
    pub fn states(&self) -> BTreeMap<String, String> {
        self.states_now().iter().map(|(url, state)| (url.clone(), state.text())).collect()
    }

    /// How many there are in each state.
    pub fn counts(&self) -> HashMap<&'static str, usize> {
        let mut counts = HashMap::new();
        self.states_now().values().for_each(|state| *counts.entry(state.name()).or_default() += 1);
        counts
    }

    /// It stands so with a peer now. Said in the log when it changes.
    pub(super) fn stands(&self, url: &str, state: PeerState) {
        let text = state.text();
        let is_well = matches!(state, PeerState::Sharing(_) | PeerState::Same(_));
        let mut states = self.states_now();
        let is_told = match (states.get(url), &state) {
            // Each time for another reason.
            (Some(PeerState::Silent(_)), PeerState::Silent(_)) => true,
            (before, state) => before == Some(state),
        };
        states.insert(url.to_owned(), state);
        drop(states);
        match (is_told, is_well) {
            (true, _) => {}
            (_, true) => log::info!("router {url}: {text}"),
            (_, false) => log::warn!("router {url}: {text}: what it has in flight does not count here"),
        }
    }

    /// Nothing is to be known of a peer any more.
    pub(super) fn leaves(&self, url: &str) {
        self.states_now().remove(url);
    }

    /// Whether another line follows this one already.
    pub(super) fn is_followed(&self, url: &str, instance: u64) -> bool {
        self.states_now().iter().any(|(it, state)| it != url && *state == PeerState::Sharing(instance))
    }
}
