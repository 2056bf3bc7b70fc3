//! What the engine knows of vLLM's requests.

use std::time::Instant;

use hashbrown::HashMap;

use super::forgetting::Forgetting;
use super::reservation::User;
use super::tiers::Changes;
use crate::config::Controls;
use crate::policy::BlockOwner;
use kvcellar_block::{AdapterId, BlockHash, BlockKey, GroupIndex, Grouping, SaltTag};

/// One request, from its arrival until its last offload is done.
#[derive(Debug)]
pub struct RequestState {
    /// Tells this request's touches from others'.
    pub serial: u32,
    /// Whose it is.
    pub owner: BlockOwner,
    /// What the user asked of the cache.
    pub controls: Controls,
    /// Block hashes so far, at the granularity of `request.block_hashes`, with the adapter mixed
    /// in.
    pub hashes: Vec<BlockHash>,
    /// Name of the LoRA adapter, empty for none.
    pub lora: Box<str>,
    /// What its LoRA adapter consists of; `None` without one.
    adapter: Option<AdapterId>,
    /// Tokens vLLM held at the last lookup.
    pub local: u32,
    /// Tokens no hit may pass any more, because a load up to there failed.
    pub barrier: Option<u32>,
    /// Its blocks may stem from before a `reset_cache`: none is kept.
    pub tainted: bool,
    /// Whose blocks it makes.
    pub salt: SaltTag,
    /// Its salt was forgotten while it was there: nothing of it is kept, whatever comes after.
    pub forgotten: bool,
    /// What it was told to forget, if that has begun.
    pub(super) forgetting: Option<Forgetting>,
    /// Tokens of the last admission that come from disk.
    pub disk_tokens: u32,
    /// What was decided about the part of the hit that lies on disk: load it, or compute it.
    pub decision: Option<bool>,
    /// Hits and misses were counted since the last lookup.
    pub counted: bool,
    /// What its last lookup asked, and the token at which the request may resume, while the answer
    /// follows from nothing else.
    pub(super) answered: Option<(Asked, u32)>,
    /// When it came.
    pub(super) arrived: Instant,
    /// What was found of it at its first admission.
    pub(super) first_hit: FirstHit,
    /// When it was first asked to wait for another request's load.
    pub waiting_since: Option<Instant>,
    /// Offload batches under way.
    pub batches: u32,
    /// vLLM finished it.
    pub finished: Option<Finished>,
}

/// What is known of a request when it arrives.
#[derive(Debug)]
pub struct Arrival<'a> {
    /// What its user asked of the cache.
    pub controls: Controls,
    /// Of vLLM's `cache_salt`.
    pub salt: SaltTag,
    /// Name of its LoRA adapter, empty for none.
    pub lora: &'a str,
    /// What the adapter consists of.
    pub adapter: Option<AdapterId>,
}

impl Default for Arrival<'_> {
    fn default() -> Self {
        Self { controls: Controls::default(), salt: SaltTag::NONE, lora: "", adapter: None }
    }
}

/// Everything that a lookup's answer follows from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Asked {
    /// Tokens that vLLM held.
    pub(super) local: u32,
    /// Tokens that no hit may pass.
    pub(super) limit: u32,
    /// Block hashes that were known.
    pub(super) hashes: usize,
    /// What the tiers held; see [`super::tiers::Tiers::changes`].
    pub(super) changes: Changes,
}

/// Tokens of a request's first admission, by where they came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct FirstHit {
    /// vLLM's own cache.
    pub(super) local: u32,
    /// The dram tier.
    pub(super) dram: u32,
    /// The disk.
    pub(super) nvme: u32,
}

/// The length of a request that vLLM finished.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Finished {
    /// Tokens of its prompt.
    pub prompt: u32,
    /// Tokens of prompt and answer.
    pub total: u32,
}

impl RequestState {
    /// A request that just arrived.
    pub fn new(User { serial, owner }: User, controls: Controls, lora: Box<str>, adapter: Option<AdapterId>) -> Self {
        Self {
            serial,
            owner,
            controls,
            hashes: Vec::new(),
            lora,
            adapter,
            local: 0,
            barrier: None,
            tainted: false,
            salt: SaltTag::NONE,
            forgotten: false,
            forgetting: None,
            disk_tokens: 0,
            decision: None,
            counted: false,
            answered: None,
            arrived: Instant::now(),
            first_hit: FirstHit::default(),
            waiting_since: None,
            batches: 0,
            finished: None,
        }
    }

    /// Who uses what it uses.
    pub fn user(&self) -> User {
        User { serial: self.serial, owner: self.owner }
    }

    /// Appends hashes as vLLM made them. The only place where they enter: keys, parents, both tiers
    /// and events carry the adapter from here.
    pub fn add_hashes(&mut self, hashes: &[BlockHash]) {
        match self.adapter {
            None => self.hashes.extend_from_slice(hashes),
            Some(adapter) => self.hashes.extend(hashes.iter().map(|hash| hash.for_adapter(&adapter))),
        }
    }

    /// Tokens whose block hashes are known.
    pub fn known_tokens(&self, grouping: &Grouping) -> u32 {
        (self.hashes.len() as u64 * u64::from(grouping.hash_tokens)).min(u64::from(u32::MAX)) as u32
    }

    /// Keys of this group's blocks `first..last`, as far as hashes are known.
    pub fn keys<'a>(
        &'a self,
        grouping: &'a Grouping,
        group: usize,
        first: u32,
        last: u32,
    ) -> impl Iterator<Item = BlockKey> + 'a {
        (first..last).map_while(move |block| {
            let hash = *self.hashes.get(grouping.hash_index(group, block))?;
            Some(BlockKey { hash, group: GroupIndex(group as u16) })
        })
    }
}

/// vLLM's requests, by its ids.
#[derive(Debug)]
pub struct Requests {
    grouping: Grouping,
    by_id: HashMap<String, RequestState>,
    last_serial: u32,
}

impl Requests {
    /// No requests yet, of a model with these groups.
    pub fn new(grouping: Grouping) -> Self {
        Self { grouping, by_id: HashMap::new(), last_serial: 0 }
    }

    /// The groups of the model.
    pub fn grouping(&self) -> &Grouping {
        &self.grouping
    }

    /// A request of `owner` arrived.
    pub fn add(&mut self, id: &str, owner: BlockOwner, arrival: Arrival<'_>) {
        let Arrival { controls, salt, lora, adapter } = arrival;
        // 0 is nobody's: slots that no request has used carry it.
        self.last_serial = self.last_serial.wrapping_add(1).max(1);
        let user = User { serial: self.last_serial, owner };
        // A session that was rewritten is still the one whose salt was forgotten.
        let forgotten = self.by_id.get(id).is_some_and(|before| before.forgotten && before.salt == salt);
        let request = RequestState { salt, forgotten, ..RequestState::new(user, controls, lora.into(), adapter) };
        self.by_id.insert(id.to_owned(), request);
    }

    /// A request; `None` for one that was left out, or that has ended.
    pub fn get(&self, id: &str) -> Option<&RequestState> {
        self.by_id.get(id)
    }

    /// As [`Self::get`], to change it.
    pub fn get_mut(&mut self, id: &str) -> Option<&mut RequestState> {
        self.by_id.get_mut(id)
    }

    /// The tiers are others than before: what they answered says nothing any more.
    pub(super) fn forget_answers(&mut self) {
        for request in self.by_id.values_mut() {
            request.answered = None;
        }
    }

    /// A salt is forgotten: nothing of the requests that have it now is kept.
    pub(super) fn forget(&mut self, salt: SaltTag) {
        for request in self.by_id.values_mut().filter(|request| request.salt == salt) {
            request.forgotten = true;
        }
    }

    /// A reset came: blocks that the requests computed so far are not kept.
    pub fn taint_all(&mut self) {
        for request in self.by_id.values_mut() {
            request.tainted = true;
        }
    }

    /// Takes out a request that vLLM has finished, once none of its offloads is under way.
    pub fn take_finished(&mut self, id: &str) -> Option<(RequestState, Finished)> {
        let request = self.by_id.get(id)?;
        let finished = request.finished.filter(|_| request.batches == 0)?;
        self.by_id.remove(id).map(|request| (request, finished))
    }
}
