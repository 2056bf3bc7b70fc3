//! The engines there are: a list that readers share, replaced whole.

use std::sync::{Arc, OnceLock};

use arc_swap::ArcSwap;

use super::engine::Engine;
use super::peers::journal::Journal;
use super::spec::Spec;

/// All engines.
#[derive(Debug, Default)]
pub struct Engines {
    list: ArcSwap<Vec<Arc<Engine>>>,
    journal: OnceLock<Arc<Journal>>,
}

impl Engines {
    /// The engines now.
    pub fn all(&self) -> Arc<Vec<Arc<Engine>>> {
        self.list.load_full()
    }

    /// What happens at the engines that come from now on is told there.
    pub fn tell(&self, journal: &Arc<Journal>) {
        // A second one is not asked for.
        let _first = self.journal.set(Arc::clone(journal));
    }

    /// Exactly these from now on. What is known of one stays as long as its address does; one that
    /// goes may end its requests.
    pub fn set(&self, specs: Vec<Spec>) {
        let before = self.all();
        let place = |spec: Spec| {
            let Some(known) = before.iter().find(|engine| engine.spec.is_same(&spec)) else {
                let engine = Engine::new(spec);
                return Arc::new(match self.journal.get() {
                    Some(journal) => engine.told_to_peers(journal),
                    None => engine,
                });
            };
            known.drain(spec.draining);
            Arc::clone(known)
        };
        let mut list: Vec<Arc<Engine>> = specs.into_iter().map(place).collect();
        list.sort_by(|a, b| a.spec.name.cmp(&b.spec.name));
        list.dedup_by(|a, b| a.spec.name == b.spec.name);
        self.list.store(Arc::new(list));
    }

    /// The engine with this name.
    pub fn find(&self, name: &str) -> Option<Arc<Engine>> {
        let list = self.list.load();
        list.binary_search_by(|engine| engine.spec.name.as_str().cmp(name)).ok().map(|at| Arc::clone(&list[at]))
    }
}

/// Those whose requests go well. All of them, where that is nobody: an engine that may fail is
/// better than none.
pub fn trusted<E: AsRef<Engine> + Clone>(engines: Vec<E>) -> Vec<E> {
    trusted_by(engines, |engine| engine.as_ref().is_trusted())
}

/// The same of engines in any form.
pub fn trusted_by<E: Clone>(engines: Vec<E>, is_trusted: impl Fn(&E) -> bool) -> Vec<E> {
    let trusted: Vec<_> = engines.iter().filter(|engine| is_trusted(engine)).cloned().collect();
    if trusted.is_empty() { engines } else { trusted }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_known_of_an_engine_stays() {
        let engines = Engines::default();
        let spec = |text| kvcellar_discovery::parse(text).expect("an engine");
        engines.set(vec![spec("url=http://h:2,name=b"), spec("url=http://h:1,name=a")]);
        let a = engines.find("a").expect("a");
        a.heard(super::super::engine::Told::default());
        engines.set(vec![spec("url=http://h:1,name=a"), spec("url=http://h:3,name=b")]);
        assert!(engines.find("a").expect("a").is_usable());
        assert!(!engines.find("b").expect("b").is_usable(), "another address is another engine");
        engines.set(Vec::new());
        assert!(engines.find("a").is_none());
    }

    #[test]
    fn an_engine_that_drains_keeps_its_books_and_comes_back_as_it_was() {
        let engines = Engines::default();
        let spec = |more: &str| kvcellar_discovery::parse(&format!("url=http://h:1,name=a{more}")).expect("an engine");
        engines.set(vec![spec("")]);
        let a = engines.find("a").expect("a");
        a.heard(super::super::engine::Told::default());
        let booking = super::super::booking::Booking::new(
            Arc::clone(&a),
            super::super::books::Promise { tokens: 100, ..Default::default() },
        );
        engines.set(vec![spec(",draining=true")]);
        let draining = engines.find("a").expect("a");
        assert_eq!((draining.is_usable(), draining.health()), (false, "draining"));
        assert_eq!(draining.books().tokens(), 100, "its request goes on");
        drop(booking);
        engines.set(vec![spec("")]);
        assert!(engines.find("a").expect("a").is_usable(), "without waiting for a scrape");
    }
}
