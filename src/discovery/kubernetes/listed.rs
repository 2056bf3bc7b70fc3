//! The objects of one kind that a watch has shown, reduced to what matters of them.

use std::collections::BTreeMap;
use std::mem;

use kube::runtime::watcher::Event;

/// Objects by name. While the API server lists them anew, those known before stay.
#[derive(Debug)]
pub(crate) struct Listed<V> {
    /// What they are, and how many there may be.
    what: &'static str,
    count_max: usize,
    known: BTreeMap<String, V>,
    listing: BTreeMap<String, V>,
    /// Why objects are left out, by name, as it was logged.
    left_out: BTreeMap<String, String>,
    is_complete: bool,
}

impl<V: PartialEq> Listed<V> {
    pub(crate) fn new(what: &'static str, count_max: usize) -> Self {
        Self {
            what,
            count_max,
            known: BTreeMap::new(),
            listing: BTreeMap::new(),
            left_out: BTreeMap::new(),
            is_complete: false,
        }
    }

    /// Objects that are known now.
    pub(crate) fn known(&self) -> &BTreeMap<String, V> {
        &self.known
    }

    /// There was a whole list of them.
    pub(crate) fn is_complete(&self) -> bool {
        self.is_complete
    }

    /// Takes in what a watch shows. `read`: what matters of an object, given what did before;
    /// `None`: nothing; an error is logged once. `true`: what is known has changed.
    pub(crate) fn on_event<K>(
        &mut self,
        event: Event<K>,
        name: impl Fn(&K) -> String,
        read: impl Fn(&K, Option<&V>) -> Result<Option<V>, String>,
    ) -> bool {
        match event {
            Event::Init => {
                self.listing.clear();
                false
            }
            Event::InitApply(object) => {
                let name = name(&object);
                let value = read(&object, self.known.get(&name));
                if let Some(value) = self.read(&name, value, self.listing.len()) {
                    self.listing.insert(name, value);
                }
                false
            }
            Event::InitDone => {
                let before = mem::replace(&mut self.known, mem::take(&mut self.listing));
                let is_first = !mem::replace(&mut self.is_complete, true);
                is_first || before != self.known
            }
            Event::Apply(object) => {
                let name = name(&object);
                let others = self.known.len() - usize::from(self.known.contains_key(&name));
                let value = read(&object, self.known.get(&name));
                match self.read(&name, value, others) {
                    Some(value) if self.known.get(&name) == Some(&value) => false,
                    Some(value) => {
                        self.known.insert(name, value);
                        true
                    }
                    None => self.known.remove(&name).is_some(),
                }
            }
            Event::Delete(object) => {
                let name = name(&object);
                self.left_out.remove(&name);
                self.known.remove(&name).is_some()
            }
        }
    }

    fn read(&mut self, name: &str, value: Result<Option<V>, String>, others: usize) -> Option<V> {
        let problem = match value {
            Ok(Some(_)) if others >= self.count_max => format!("there are {} already", self.count_max),
            Ok(value) => {
                self.left_out.remove(name);
                return value;
            }
            Err(problem) => problem,
        };
        if self.left_out.get(name) != Some(&problem) {
            log::warn!("the {} {name} is left out: {problem}", self.what);
            if self.left_out.len() < self.count_max {
                self.left_out.insert(name.to_owned(), problem);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Objects are their names; those that end in `?` are not understood, in `-` nothing.
    fn on(listed: &mut Listed<usize>, event: Event<&str>) -> bool {
        listed.on_event(
            event,
            |name| (*name).to_owned(),
            |name, _| match name.chars().last() {
                Some('?') => Err("why?".to_owned()),
                Some('-') => Ok(None),
                _ => Ok(Some(name.len())),
            },
        )
    }

    fn names(listed: &Listed<usize>) -> Vec<&str> {
        listed.known().keys().map(String::as_str).collect()
    }

    #[test]
    fn what_is_known_stays_until_a_new_list_is_whole() {
        let mut listed = Listed::new("thing", 10);
        assert!(!on(&mut listed, Event::Init) && !on(&mut listed, Event::InitApply("a")));
        assert!(!listed.is_complete() && listed.known().is_empty());
        assert!(on(&mut listed, Event::InitDone) && listed.is_complete());
        assert!(on(&mut listed, Event::Apply("b")) && !on(&mut listed, Event::Apply("b")), "the same again");
        on(&mut listed, Event::Init);
        on(&mut listed, Event::InitApply("b"));
        assert_eq!(names(&listed), ["a", "b"]);
        assert!(on(&mut listed, Event::InitDone));
        assert_eq!(names(&listed), ["b"], "the other one went unseen");
        on(&mut listed, Event::Init);
        on(&mut listed, Event::InitApply("c"));
        on(&mut listed, Event::Init);
        on(&mut listed, Event::InitApply("b"));
        assert!(!on(&mut listed, Event::InitDone), "a list that broke off does not count");
        assert!(on(&mut listed, Event::Delete("b")) && !on(&mut listed, Event::Delete("b")));
    }

    #[test]
    fn an_empty_first_list_is_a_change() {
        let mut listed = Listed::new("thing", 10);
        on(&mut listed, Event::Init);
        assert!(on(&mut listed, Event::InitDone));
        on(&mut listed, Event::Init);
        assert!(!on(&mut listed, Event::InitDone));
    }

    #[test]
    fn what_is_not_understood_is_left_out() {
        let mut listed = Listed::new("thing", 10);
        for name in ["a", "b?", "c-"] {
            on(&mut listed, Event::Apply(name));
        }
        assert_eq!(names(&listed), ["a"]);
        assert_eq!(listed.left_out.keys().collect::<Vec<_>>(), ["b?"]);
        on(&mut listed, Event::Delete("b?"));
        assert!(listed.left_out.is_empty());
    }

    #[test]
    fn there_is_a_bound() {
        let mut listed = Listed::new("thing", 2);
        for name in ["a", "b", "c", "a"] {
            on(&mut listed, Event::Apply(name));
        }
        assert_eq!(names(&listed), ["a", "b"]);
        on(&mut listed, Event::Init);
        for name in ["c", "d", "e"] {
            on(&mut listed, Event::InitApply(name));
        }
        on(&mut listed, Event::InitDone);
        assert_eq!(names(&listed), ["c", "d"]);
    }
}
