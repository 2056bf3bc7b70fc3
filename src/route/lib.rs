//! The router: which engine a request should go to, so that it saves the most work.
//!
//! A request's way: a front end ([`proxy`] or [`ext_proc`]) reads it and hands it to
//! [`router::Router::route`]; [`request`] reads the body, [`tokens`] finds the ids vLLM will see,
//! [`prefix`] says what each engine has of them (the [`kvcellar_index`], or its own guess,
//! [`approximate`]), [`decider`] weighs that against load with the [`scorers`] or the [`cost`]
//! model, and the [`books`] keep what was promised until the answer has ended ([`answer`]).
//!
//! Promises: deciding takes no lock that a writer of the index holds; every table is bounded; a
//! request that cannot be understood is passed on or refused by name, never dropped; everything
//! booked is given back.

pub mod admin;
pub mod aliases;
pub mod answer;
pub mod approximate;
pub mod booking;
pub mod books;
pub mod breaker;
pub mod choose;
pub mod cost;
pub mod credit;
pub mod decider;
pub mod dialect;
pub mod engine;
pub mod engines;
pub mod estimate;
pub mod expectations;
pub mod ext_proc;
pub mod gate;
pub mod hall;
pub mod limits;
pub mod metrics;
pub mod outcome;
pub mod peers;
pub mod picker_config;
pub mod prefix;
pub mod prefix_source;
pub mod prompt;
pub mod proxy;
pub mod queue;
pub mod remote;
pub mod request;
pub mod retry_budget;
pub mod router;
pub mod scorers;
pub mod scrape;
pub mod see;
pub mod self_check;
pub mod sessions;
pub mod simulation;
pub mod source;
pub mod spec;
pub mod speed;
pub mod streams;
pub mod tally;
pub mod ticket;
pub mod tokens;
pub mod traces;
pub mod two_steps;
pub mod upstream;
pub mod urgency;
pub mod view;
