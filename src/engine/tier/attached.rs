//! The engine's work while it has tiers: every hook of vLLM and every report of the mover.

use std::time::Instant;

use super::disk_tier::{DiskParts, DiskSettings, DiskTier, OpenedDisk};
use super::jobs::Report;
use super::load::{self, Admission, Hit, Loads};
use super::offload::{Offer, Offloads, Start};
use super::restore::Consequences;
use super::retire::retire;
use super::session::Session;
use super::tiers::Tiers;
use super::trace;
use super::what_if::WhatIf;
use crate::event_log::Run;
use crate::limits;
use crate::metrics::{Counters, DropReason, Gauges};
use crate::policy::PolicyName;
use crate::violated;
use kvcellar_block::{Grouping, SlotIndex, Tier};

/// Tiers, and what is under way between them and vLLM's KV cache.
pub(super) struct Attached {
    /// The tiers.
    pub(super) tiers: Tiers,
    offloads: Offloads,
    loads: Loads,
    what_if: WhatIf,
    /// Requests to forget so far.
    pub(super) forgets: u64,
    /// When slots were overwritten last.
    pub(super) erased_at: Option<Instant>,
}

/// What changes while pending work goes on; see [`Attached::progress`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Progress {
    filling: u64,
    writing: u64,
    events: u64,
    on_disk: u64,
    to_erase: u64,
    batches: u64,
}

impl Attached {
    /// Nothing is under way. `policy`: of the dram tier.
    pub(super) fn new(tiers: Tiers, policy: PolicyName, grouping: &Grouping) -> Self {
        let what_if = WhatIf::new(policy, tiers.dram.memory().slot_count(), grouping);
        let (offloads, loads) = (Offloads::default(), Loads::default());
        Self { tiers, offloads, loads, what_if, forgets: 0, erased_at: None }
    }

    /// Puts a disk below the dram tier. `None`: there is no pool that it could be read into.
    pub(super) fn open_disk(&mut self, parts: DiskParts<'_>, settings: DiskSettings) -> Option<OpenedDisk> {
        let Some(pool) = &self.tiers.pool else {
            violated!("a disk is opened over slots that are no pool");
            return None;
        };
        let (disk, opened) = DiskTier::open(parts, settings, pool, &mut self.tiers.dram);
        self.tiers.disk = Some(disk);
        self.what_if.add_disk(opened.extents_max);
        Some(opened)
    }

    /// Finishes what the ranks have answered, and has dirty blocks written.
    pub(super) fn poll(&mut self, session: &mut Session) {
        if self.tiers.dram.kept() > 0 {
            self.tiers.dram.let_go_of_kept(Instant::now());
        }
        while let Some(request) = self.offloads.complete_next(&mut self.tiers, session) {
            self.retire_if_done(session, &request);
            if self.offloads.is_empty() {
                self.log_state(session);
            }
        }
        self.erase_some();
        self.clean(session);
    }

    fn clean(&mut self, session: &mut Session) {
        if let Some(disk) = &mut self.tiers.disk {
            disk.clean(&mut self.tiers.dram, &mut session.log);
        }
    }

    /// Takes in what the mover found out. Returns the slots whose followers are to be woken.
    pub(super) fn on_reports(&mut self, session: &mut Session, reports: Vec<Report>) -> Vec<SlotIndex> {
        let mut wake = Vec::new();
        let Tiers { dram, disk: Some(disk), .. } = &mut self.tiers else {
            violated!("a mover reports to an engine without disk");
            return wake;
        };
        for report in reports {
            let Consequences { wake: woken, lost } = disk.on_report(dram, &mut session.log, report);
            wake.extend(woken);
            self.loads.on_lost_blocks(&lost);
        }
        disk.advance_window(dram);
        disk.clean(dram, &mut session.log);
        wake
    }

    /// What has to be done now and then, also when nothing ended. Returns the slots whose followers
    /// are to be woken.
    pub(super) fn tick(&mut self, session: &mut Session, now: Instant) -> Vec<SlotIndex> {
        self.poll(session);
        let Tiers { dram, disk: Some(disk), .. } = &mut self.tiers else {
            violated!("a mover drives an engine without disk");
            return Vec::new();
        };
        let Consequences { wake, lost } = disk.tick(dram, &mut session.log, now);
        self.loads.on_lost_blocks(&lost);
        wake
    }

    /// One round of writing everything dirty to disk. Returns whether nothing is left to do.
    pub(super) fn flush(&mut self, session: &mut Session) -> bool {
        // What is in memory only ends with the engine.
        let Some(disk) = &mut self.tiers.disk else { return true };
        disk.cleaner.write_everything();
        self.poll(session);
        self.tiers.disk.as_ref().is_none_or(DiskTier::is_flushed)
    }

    /// See [`Loads::lookup`].
    pub(super) fn lookup(&mut self, session: &mut Session, id: &str, tokens: u32, local: u32) -> Hit {
        self.loads.lookup(&mut self.tiers, session, id, tokens, local)
    }

    /// See [`Offloads::offer`]. A request whose load is running has nothing yet that could be
    /// offered.
    pub(super) fn offer(&mut self, session: &mut Session, offer: &Offer<'_>, start: Start) {
        if !self.loads.is_running(offer.request) {
            self.offloads.offer(&mut self.tiers, session, offer, start);
        }
    }

    /// See [`Loads::admit`]. Without external tokens there is nothing to load.
    pub(super) fn admit(&mut self, session: &mut Session, admission: Admission<'_>) {
        if admission.external == 0 {
            let counters = &mut self.tiers.dram.counters;
            load::count_lookup(counters, &mut session.requests, admission.id, 0, (0, 0));
            return;
        }
        self.loads.admit(&mut self.tiers, session, &self.offloads, admission);
    }

    /// Every rank reported the end of a load. Loads that are not ours are ignored.
    pub(super) fn load_ended(&mut self, session: &mut Session, id: &str, failed: bool) {
        let ours = self.loads.end(&mut self.tiers, session, id, failed);
        if ours && self.loads.is_empty() && self.offloads.is_empty() {
            self.log_state(session);
        }
    }

    /// See [`retire`]; nothing happens before vLLM has finished the request and its last offload is
    /// done.
    pub(super) fn retire_if_done(&mut self, session: &mut Session, id: &str) {
        if let Some((request, finished)) = session.requests.take_finished(id) {
            let Session { requests, log, .. } = session;
            retire(&mut self.tiers.dram, log, requests.grouping(), id, &request, finished);
            self.log_state(session);
        }
    }

    /// vLLM finished a request.
    pub(super) fn finish(&mut self, session: &mut Session, id: &str) {
        let Session { requests, .. } = &*session;
        if let Some((request, finished)) = requests.get(id).and_then(|request| Some((request, request.finished?))) {
            self.what_if.on_finished(requests.grouping(), request, finished);
        }
        self.retire_if_done(session, id);
    }

    /// vLLM gives these blocks to somebody in this step: whoever still reads them is waited for.
    pub(super) fn wait_for(&self, session: &mut Session, blocks: impl Iterator<Item = u32>, flags: u16) {
        if self.offloads.fences() == 0 {
            return;
        }
        for block in blocks {
            self.offloads.wait_for(block, flags, &mut session.plan);
        }
    }

    /// These vLLM blocks are written before anybody can wait.
    pub(super) fn overwrite(&mut self, blocks: impl Iterator<Item = u32>) {
        if self.offloads.fences() > 0 {
            blocks.for_each(|block| self.offloads.overwrite(block, &self.tiers.dram));
        }
    }

    /// Tells subscribers that nothing is to be had from our tiers any more.
    pub(super) fn withdraw(&mut self) {
        let Tiers { dram, disk, .. } = &mut self.tiers;
        for slot in dram.visible_slots() {
            if let Some(key) = dram.key(slot) {
                dram.events.removed(Tier::Dram, key);
            }
        }
        if let Some(disk) = disk {
            disk.medium.extents.withdraw(&mut dram.events);
        }
    }

    /// Drops every block. Returns the pool's new generation.
    pub(super) fn reset(&mut self) -> u64 {
        self.offloads.on_reset();
        self.what_if.reset();
        let Tiers { dram, disk, .. } = &mut self.tiers;
        if let Some(disk) = disk {
            disk.reset(dram);
        }
        let generation = dram.memory().bump_cache_generation();
        for slot in dram.visible_slots() {
            dram.drop_block(slot, DropReason::Reset);
        }
        generation
    }

    /// Copies to be noticed or events to be published. `events_enabled`: what is being written will
    /// be announced.
    pub(super) fn has_pending_work(&self, events_enabled: bool) -> bool {
        let of_disk = |disk: &DiskTier| {
            (disk.is_announcing() && disk.medium.health.is_in()) || (events_enabled && !disk.is_idle())
        };
        !self.offloads.is_empty()
            || self.to_erase() > 0
            || !self.tiers.dram.events.is_empty()
            || self.tiers.disk.as_ref().is_some_and(of_disk)
    }

    /// What changes when pending work goes on.
    pub(super) fn progress(&self) -> Progress {
        let census = self.tiers.dram.census();
        Progress {
            filling: census.filling,
            writing: census.writing,
            events: self.tiers.dram.events.len() as u64,
            on_disk: self.tiers.disk.as_ref().map_or(0, |disk| disk.medium.extents.committed()),
            to_erase: self.to_erase(),
            batches: self.offloads.last_number(),
        }
    }

    /// Nothing is under way and nothing waits.
    pub(super) fn is_quiet(&self) -> bool {
        let moving = |disk: &DiskTier| !disk.is_idle() || disk.is_announcing();
        self.offloads.is_empty()
            && self.offloads.fences() == 0
            && self.to_erase() == 0
            && self.tiers.dram.events.is_empty()
            && !self.tiers.disk.as_ref().is_some_and(moving)
    }

    /// Events for this step, neighbours joined.
    pub(super) fn take_events(&mut self) -> Vec<Run> {
        self.tiers.dram.events.take(limits::EVENTS_PER_STEP_MAX)
    }

    /// Everything that only grows.
    pub(super) fn counters(&self) -> Counters {
        Counters { what_if: self.what_if.counts(), ..self.tiers.dram.counters }
    }

    /// The state now.
    pub(super) fn gauges(&self) -> Gauges {
        let census = self.tiers.dram.census();
        Gauges {
            total_slots: census.free + census.filling + census.filled,
            free_slots: census.free,
            filling_slots: census.filling,
            filled_slots: census.filled,
            pins: census.pins,
            pinned_blocks: self.tiers.dram.kept(),
            leases: self.loads.running() as u64,
            fences: self.offloads.fences() as u64,
            pending_events: self.tiers.dram.events.len() as u64,
            pool_bytes: self.tiers.pool.as_ref().map_or(0, |pool| pool.bytes()),
            pool_huge_bytes: self.tiers.pool.as_ref().map_or(0, |pool| pool.huge_bytes()),
            clean_slots: census.clean,
            ..self.tiers.disk.as_ref().map(DiskTier::gauges).unwrap_or_default()
        }
    }

    fn log_state(&self, session: &mut Session) {
        session.log.record(|| {
            let gauges = self.gauges();
            trace::line(
                "state",
                &[
                    ("total", gauges.total_slots.into()),
                    ("free", gauges.free_slots.into()),
                    ("filling", gauges.filling_slots.into()),
                    ("filled", gauges.filled_slots.into()),
                    ("pins", gauges.pins.into()),
                    ("leases", gauges.leases.into()),
                    ("fences", gauges.fences.into()),
                ],
            )
        });
    }
}
