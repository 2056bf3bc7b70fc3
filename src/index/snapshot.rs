//! Copies of engines' blocks, from which another index goes on: a new replica has them before it
//! takes traffic.
//!
//! Engine by engine, each as it is after its last batch: that batch's number and fingerprint travel
//! along, so that the other index asks the engine for what came later, and notices when the engine
//! has restarted meanwhile. Layout: a magic line, the length of a JSON head and the head, then for
//! each engine the same followed by 24 bytes a link (hash, key, copies in each tier). What comes in
//! is not trusted: lengths are checked before they are used.

use serde::{Deserialize, Serialize};

use super::column::Ratio;
use super::indexed_engine::EventMark;
use super::links::UNKNOWN;
use super::roster::{EngineId, Need};
use super::tiers::{Column, TOLD_TIERS};
use super::writer::IndexWriter;
use crate::limits;
use kvcellar_block::error::{Error, Result};

const MAGIC: &[u8] = b"kvcellar index 1\n";
const RECORD: usize = 24;

/// What holds for all engines.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Head {
    block_tokens: u32,
}

/// One engine.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct EngineHead {
    name: String,
    model: String,
    mark: EventMark,
    groups: Vec<GroupHead>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct GroupHead {
    group: u32,
    need: Need,
    block_tokens: u32,
    links: usize,
}

fn section(head: &impl Serialize, out: &mut Vec<u8>) -> Result<()> {
    let json = serde_json::to_vec(head).map_err(|error| Error::lost("snapshot", error.to_string()))?;
    out.extend_from_slice(&(json.len() as u32).to_le_bytes());
    out.extend_from_slice(&json);
    Ok(())
}

impl IndexWriter {
    /// The beginning of a snapshot.
    ///
    /// # Errors
    /// [`Error::DataLost`] when it cannot be written.
    pub fn snapshot_head(&self) -> Result<Vec<u8>> {
        let mut out = MAGIC.to_vec();
        section(&Head { block_tokens: self.block_tokens }, &mut out)?;
        Ok(out)
    }

    /// One engine's part. `None`: there is no such engine, or it cannot be copied (no batch yet,
    /// blocks that wait for their parent, blocks of another size): the other index follows it from
    /// its replays.
    ///
    /// # Errors
    /// [`Error::DataLost`] when it cannot be written.
    pub fn snapshot_engine(&self, id: EngineId) -> Result<Option<Vec<u8>>> {
        let Some(Some(engine)) = self.engines.get(id.0 as usize) else { return Ok(None) };
        let Some(mark) = engine.mark.clone() else { return Ok(None) };
        let columns = self.columns_of(id);
        let (mut groups, mut links) = (Vec::new(), Vec::new());
        for column in columns {
            let Some(state) = self.column(column) else { return Ok(None) };
            let plain = state.ratio == Ratio::Same || state.links.held() == 0;
            if !plain || self.orphans.any(column) || state.links.iter().any(|(_, link)| link.key == UNKNOWN) {
                return Ok(None);
            }
            let before = links.len();
            for (hash, link) in state.links.iter() {
                links.extend_from_slice(&hash.to_le_bytes());
                links.extend_from_slice(&link.key.to_le_bytes());
                links.extend_from_slice(&link.counts());
                links.extend_from_slice(&[0; RECORD - 16 - TOLD_TIERS]);
            }
            let count = (links.len() - before) / RECORD;
            groups.push(GroupHead {
                group: state.group,
                need: state.need,
                block_tokens: state.block_tokens,
                links: count,
            });
        }
        let mut out = Vec::with_capacity(links.len() + 1024);
        let view = &engine.view;
        section(&EngineHead { name: view.name.clone(), model: view.model.clone(), mark, groups }, &mut out)?;
        out.extend_from_slice(&links);
        Ok(Some(out))
    }

    /// Takes a whole snapshot over into an empty index. Returns where each engine's events stand.
    ///
    /// # Errors
    /// [`Error::DataLost`] when it is none, or of another block size than this index was told to
    /// have; what was taken over by then stays, whole engines only.
    pub fn restore(&mut self, bytes: &[u8]) -> Result<Vec<(String, EventMark)>> {
        let wrong = |why: &str| Error::lost("snapshot", why);
        let mut rest = bytes.strip_prefix(MAGIC).ok_or_else(|| wrong("it does not begin as one"))?;
        let head: Head = read_section(&mut rest)?;
        if self.block_tokens != 0 && self.block_tokens != head.block_tokens {
            return Err(wrong(&format!("its blocks have {} tokens, ours {}", head.block_tokens, self.block_tokens)));
        }
        self.block_tokens = head.block_tokens;
        self.publish();
        let mut marks = Vec::new();
        while !rest.is_empty() {
            let engine: EngineHead = read_section(&mut rest)?;
            let total = engine.groups.iter().try_fold(0_usize, |sum, group| sum.checked_add(group.links));
            let len =
                total.and_then(|links| links.checked_mul(RECORD)).ok_or_else(|| wrong("a length is too large"))?;
            if engine.groups.len() > limits::GROUPS_MAX {
                return Err(wrong("an engine has too many groups"));
            }
            let (mut links, after) = rest.split_at_checked(len).ok_or_else(|| wrong("it ends early"))?;
            rest = after;
            let id = self.engine(&engine.name, &engine.model)?;
            for group in &engine.groups {
                let (these, others) = links.split_at(group.links * RECORD);
                links = others;
                if let Some(column) = self.column_of(id, group.group) {
                    self.learn_size(column, group.block_tokens);
                    self.learn_need(column, group.need);
                    self.restore_links(column, these);
                }
            }
            self.set_mark(id, engine.mark.clone());
            marks.push((engine.name, engine.mark));
        }
        Ok(marks)
    }

    fn restore_links(&mut self, column: Column, records: &[u8]) {
        let room = self.make_room(column, records.len() / RECORD);
        self.counts.refused += (records.len() / RECORD - room) as u64;
        for record in records.chunks_exact(RECORD).take(room) {
            let number =
                |at: usize| record[at..at + 8].iter().rev().fold(0_u64, |sum, byte| sum << 8 | u64::from(*byte));
            let (hash, key) = (number(0), number(8).max(super::keys::KEY_MIN));
            let mut counts = [0; TOLD_TIERS];
            counts.copy_from_slice(&record[16..16 + TOLD_TIERS]);
            let Some(state) = self.state(column) else { return };
            let link = state.links.restore(hash, key, counts);
            self.show(column, hash, key, link.mask());
        }
        self.recount(column);
    }
}

fn read_section<T: for<'a> Deserialize<'a>>(rest: &mut &[u8]) -> Result<T> {
    let wrong = |why: String| Error::lost("snapshot", why);
    let (len, after) = rest.split_first_chunk::<4>().ok_or_else(|| wrong("it ends early".to_owned()))?;
    let len = u32::from_le_bytes(*len) as usize;
    let (json, after) = after.split_at_checked(len).ok_or_else(|| wrong("it ends early".to_owned()))?;
    *rest = after;
    serde_json::from_slice(json).map_err(|error| wrong(error.to_string()))
}
