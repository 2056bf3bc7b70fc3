//! Several routers before one fleet, which share what each of them knows, so that they balance as
//! one does.
//!
//! What happens at a router is [`news`]; a [`journal`] keeps the last of it, numbered. Each router
//! asks every other one, ten times a second and more, for what is new ([`exchange`]); a
//! [`follower`] says what to ask for, and what to do with the answer. A router that is new, or that
//! has missed too much, gets a snapshot first.
//!
//! Promises: nothing here makes a request wait, but for locks that are held for a short time; all
//! tables are bounded; what a peer has in flight counts until it has ended or the peer has been
//! silent for [`crate::limits::PEER_SILENCE`], and never longer; what a router cannot read it
//! refuses by name.

pub mod exchange;
pub mod follower;
pub mod hear;
pub mod journal;
pub mod news;
pub mod options;
pub mod standing;
