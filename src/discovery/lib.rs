//! Where the engines of a fleet are, for the index and for the router: one grammar for an engine on
//! the command line and in a file, a file that is read again when it changes, names that are
//! resolved again, pods of Kubernetes that are watched.
//!
//! What an engine is differs between the two, and only that is theirs, as an [`EngineSpec`]: the
//! index needs the sockets of its events (`endpoint`, which it may open itself: `bind`) and the
//! model, as it serves many at once; the router needs where the engine answers (`url`) and whether
//! it is `draining`, and its events only in one of its modes. So the fields are not the same, and
//! the first port behind a name is that of the events there and of the API here.

mod engine;
mod kubernetes;
mod limits;
mod places;
mod pod_notes;
mod ports;

pub use engine::{EngineSpec, events_address, name_or_empty, parse, read_file};
pub use kubernetes::Priorities;
pub use places::{Finder, Places, nobody};
pub use pod_notes::{EngineRole, PodNotes};
