//! What people should know, until somebody takes it. The oldest notes are kept.

use std::sync::{Mutex, PoisonError};

use crate::limits::COPIER_NOTES_MAX;

/// Notes of one copier.
#[derive(Debug, Default)]
pub struct Notes(Mutex<Vec<String>>);

impl Notes {
    /// Keeps a note, unless too many wait.
    pub fn push(&self, note: String) {
        let mut notes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if notes.len() < COPIER_NOTES_MAX {
            notes.push(note);
        }
    }

    /// All notes, once.
    pub fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
