//! Tenants that share an engine's tiers, as the user wrote them.

use serde_json::{Map, Value};

use super::wrong;
use crate::limits::TENANTS_MAX;
use kvcellar_block::SaltTag;
use kvcellar_block::error::{Error, Result};

/// Whose a block is: a tenant, by its number in the configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, PartialOrd, Ord)]
pub struct BlockOwner(pub u8);

impl BlockOwner {
    /// No tenant: a request that names none, or one that the configuration does not know.
    pub const NOBODY: Self = Self(0);
}

/// What one tenant gets of a tier, in places.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Quota {
    /// Others leave it so many.
    pub guaranteed: u32,
    /// It never has more.
    pub limit: u32,
}

impl Quota {
    /// Whatever others leave.
    pub const NONE: Self = Self { guaranteed: 0, limit: u32::MAX };
}

/// How those who are no tenant are named.
const OTHERS: &str = "other";

/// Characters of a name: it becomes a label of metrics.
const NAME_MAX: usize = 64;

/// A share of a tier, in millionths.
type Millionths = u32;

const WHOLE: Millionths = 1_000_000;

/// One tenant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tenant {
    /// As metrics and requests name it.
    pub name: String,
    /// Requests with this `cache_salt` are its own, too; [`SaltTag::NONE`]: only those that name
    /// it.
    salt: SaltTag,
    guaranteed: Millionths,
    limit: Millionths,
}

/// All of them, in the order of their names.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TenantList(Vec<Tenant>);

impl TenantList {
    /// Reads the object that the user wrote.
    pub(super) fn parse(key: &str, value: &Value) -> Result<Self> {
        let object = value.as_object().ok_or_else(|| wrong(key, value))?;
        if object.len() > TENANTS_MAX {
            let count = object.len();
            return Err(bad(key, &format!("there are {count}"), &format!("at most {TENANTS_MAX}")));
        }
        let mut found = Vec::with_capacity(object.len());
        for (name, value) in object {
            let key = format!("{key}.{name}");
            if name == OTHERS {
                return Err(bad(&key, "stands for all requests of no tenant", "another name"));
            }
            if name.is_empty() || name.len() > NAME_MAX || !name.chars().all(|it| it.is_ascii_graphic()) {
                return Err(bad(&key, "is no name", &format!("1 to {NAME_MAX} printable ASCII characters")));
            }
            let facts = value
                .as_object()
                .ok_or_else(|| bad(&key, "is no object", "{\"guaranteed\": \"20%\", \"limit\": \"60%\"}"))?;
            found.push(tenant(&key, name, facts)?);
        }
        found.sort_by(|one, other| one.name.cmp(&other.name));
        let together: u64 = found.iter().map(|tenant| u64::from(tenant.guaranteed)).sum();
        if together > u64::from(WHOLE) {
            let percent = together as f64 * 100.0 / f64::from(WHOLE);
            return Err(bad(
                key,
                &format!("{percent}% are guaranteed together"),
                "shares that are at most 100% together",
            ));
        }
        let salts: Vec<_> = found.iter().map(|tenant| tenant.salt).filter(|salt| *salt != SaltTag::NONE).collect();
        if salts.iter().enumerate().any(|(at, salt)| salts[..at].contains(salt)) {
            return Err(bad(key, "two tenants have one cache_salt", "another cache_salt for each"));
        }
        Ok(Self(found))
    }

    /// Whose a request is. `name`: what it says itself, which comes first; `salt`: of its
    /// `cache_salt`.
    pub fn owner(&self, name: Option<&str>, salt: SaltTag) -> BlockOwner {
        let is_it = |tenant: &Tenant| match name {
            Some(name) => tenant.name == name,
            None => salt != SaltTag::NONE && tenant.salt == salt,
        };
        self.0.iter().position(is_it).map_or(BlockOwner::NOBODY, |at| BlockOwner(at as u8 + 1))
    }

    /// Names of those who may own blocks: nobody, as `other`, and the tenants. None without
    /// tenants.
    pub fn names(&self) -> impl Iterator<Item = (BlockOwner, &str)> {
        let others = (!self.0.is_empty()).then_some((BlockOwner::NOBODY, OTHERS));
        let tenants = self.0.iter().enumerate().map(|(at, tenant)| (BlockOwner(at as u8 + 1), tenant.name.as_str()));
        others.into_iter().chain(tenants)
    }

    /// What each gets of a tier of so many places.
    pub fn quotas(&self, places: u32) -> Vec<Quota> {
        let part = |share: Millionths| (u64::from(places) * u64::from(share) / u64::from(WHOLE)) as u32;
        // One block at least, so that a small tier does not shut a tenant out.
        self.0.iter().map(|it| Quota { guaranteed: part(it.guaranteed), limit: part(it.limit).max(1) }).collect()
    }
}

fn tenant(key: &str, name: &str, facts: &Map<String, Value>) -> Result<Tenant> {
    let mut made = Tenant { name: name.to_owned(), salt: SaltTag::NONE, guaranteed: 0, limit: WHOLE };
    for (fact, value) in facts {
        let key = format!("{key}.{fact}");
        match fact.as_str() {
            "guaranteed" => made.guaranteed = share(&key, value)?,
            "limit" => made.limit = share(&key, value)?,
            "cache_salt" => {
                let salt = value.as_str().filter(|salt| !salt.is_empty());
                let salt = salt.ok_or_else(|| bad(&key, "is no text", "the tenant's cache_salt"))?;
                made.salt = SaltTag::of(salt.as_bytes());
            }
            _ => return Err(bad(&key, "is not a known key", "guaranteed, limit or cache_salt")),
        }
    }
    if made.limit == 0 || made.guaranteed > made.limit {
        return Err(bad(&format!("{key}.limit"), "is less than what is guaranteed, or nothing", "a larger share"));
    }
    Ok(made)
}

/// A share such as "20%".
#[expect(clippy::cast_sign_loss, reason = "a share is not negative")]
fn share(key: &str, value: &Value) -> Result<Millionths> {
    let number = value.as_str().and_then(|text| text.trim().strip_suffix('%')?.trim_end().parse::<f64>().ok());
    let percent = number.filter(|percent| (0.0..=100.0).contains(percent));
    percent
        .map(|percent| (percent / 100.0 * f64::from(WHOLE)).round() as Millionths)
        .ok_or_else(|| bad(key, &format!("{value} is not valid"), "a share of the tier such as \"20%\""))
}

fn bad(key: &str, problem: &str, wanted: &str) -> Error {
    Error::config(key, problem, format!("Write {wanted}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> Result<TenantList> {
        TenantList::parse("tenants", &serde_json::from_str(json).expect("JSON"))
    }

    #[test]
    fn shares_become_places() {
        let json = r#"{"b": {"limit": "50%", "cache_salt": "s"}, "a": {"guaranteed": "12.5 %"}}"#;
        let tenants = parse(json).expect("tenants");
        let all = Quota { guaranteed: 12, limit: 100 };
        assert_eq!(tenants.quotas(100), [all, Quota { guaranteed: 0, limit: 50 }]);
        assert_eq!(tenants.quotas(1)[1].limit, 1, "never shut out");
        let names: Vec<_> = tenants.names().map(|(owner, name)| (owner.0, name)).collect();
        assert_eq!(names, [(0, "other"), (1, "a"), (2, "b")]);
        assert_eq!(TenantList::default().names().count(), 0);
        let owner = |name, salt: &str| tenants.owner(name, SaltTag::of(salt.as_bytes())).0;
        assert_eq!((owner(Some("a"), ""), owner(None, "s"), owner(Some("a"), "s")), (1, 2, 1));
        assert_eq!((owner(Some("c"), "s"), owner(None, "a"), owner(None, "")), (0, 0, 0));
    }

    #[test]
    fn wrong_tenants_are_named() {
        for (json, place, problem) in [
            ("[]", "tenants", "is not valid"),
            (r#"{"a": 1}"#, "tenants.a", "no object"),
            (r#"{"": {}}"#, "tenants.", "no name"),
            (r#"{"other": {}}"#, "tenants.other", "no tenant"),
            (r#"{"a": {"share": "1%"}}"#, "tenants.a.share", "not a known key"),
            (r#"{"a": {"guaranteed": 20}}"#, "tenants.a.guaranteed", "20 is not valid"),
            (r#"{"a": {"guaranteed": "120%"}}"#, "tenants.a.guaranteed", "not valid"),
            (r#"{"a": {"guaranteed": "NaN%"}}"#, "tenants.a.guaranteed", "not valid"),
            (r#"{"a": {"guaranteed": "20%", "limit": "10%"}}"#, "tenants.a.limit", "less than what is guaranteed"),
            (r#"{"a": {"limit": "0%"}}"#, "tenants.a.limit", "nothing"),
            (r#"{"a": {"guaranteed": "60%"}, "b": {"guaranteed": "50%"}}"#, "tenants", "110% are guaranteed"),
            (r#"{"a": {"cache_salt": "x"}, "b": {"cache_salt": "x"}}"#, "tenants", "one cache_salt"),
            (r#"{"a": {"cache_salt": ""}}"#, "tenants.a.cache_salt", "no text"),
        ] {
            let text = parse(json).expect_err(json).to_string();
            assert!(text.starts_with(place) && text.contains(problem) && text.contains("Write "), "{json}: {text}");
        }
        let many: Vec<_> = (0..17).map(|at| format!(r#""t{at}": {{}}"#)).collect();
        assert!(parse(&format!("{{{}}}", many.join(","))).expect_err("too many").to_string().contains("at most 16"));
    }
}
