package conformance

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// model holds, for each limit and key, the states that explain all answers so far. There are several where the store
// may have forgotten a state, and may not.
type model struct {
	places  map[place][]held
	granted map[place]grant // by group and request id
	seen    quota.Micros    // the latest time of any call
}

// place is a limit's name and a key, or a group and a request id.
type place struct{ name, key string }

// held is a state that the store may hold, and the time until which it must not forget it.
type held struct {
	driver.Item
	until quota.Micros
}

// grant is a call that was granted under an id.
type grant struct {
	charges   []quota.Charge
	decisions []quota.Decision
	until     quota.Micros
}

func newModel() *model {
	return &model{places: map[place][]held{}, granted: map[place]grant{}}
}

func placeOf(c *quota.Charge) place { return place{c.Limit.Name(), c.Key} }

// most bounds the combinations of states that one answer is compared with.
const most = 64

// check returns the fault of the answer to a call at a time, or ""; 0 stands for the time in the answer. The model
// learns from a right answer.
func (m *model) check(cs []quota.Charge, got []quota.Decision, err error, now quota.Micros) string {
	if err == nil && now == 0 {
		now = got[0].At
	}
	m.seen = max(m.seen, now)
	id := place{quota.Group(cs[0].Key), cs[0].ID}
	repeat := "" // the fault of the answer where the id is remembered
	if g, ok := m.granted[id]; ok && cs[0].ID != "" {
		if repeat = g.check(cs, got, err); repeat == "" || m.seen < g.until {
			return repeat
		}
	}
	options := make([][]held, len(cs))
	n := 1
	for i := range cs {
		options[i] = m.options(placeOf(&cs[i]))
		n *= len(options[i])
	}
	var wrong string
	next := make([][]held, len(cs))
	right := false
	for pick := range min(n, most) {
		items := make([]driver.Item, len(cs))
		from := make([]held, len(cs))
		for i, rest := 0, pick; i < len(cs); i++ {
			from[i] = options[i][rest%len(options[i])]
			rest /= len(options[i])
			if j := sameKey(cs[:i], &cs[i]); j >= 0 {
				from[i] = from[j]
			}
			items[i] = from[i].Item
		}
		want := make([]quota.Decision, len(cs))
		failed := driver.Apply(cs, items, now, want)
		if diff := differ(got, err, want, failed); diff != "" {
			if wrong == "" {
				wrong = diff
			}
			continue
		}
		right = true
		for i := range items {
			if failed == nil && items[i].Write {
				from[i] = held{items[i], after(now, want[i].ResetAfter)}
				if j := sameKey(cs[:i], &cs[i]); j >= 0 {
					from[j] = from[i]
				}
			} else if j := sameKey(cs[:i], &cs[i]); j >= 0 {
				from[i] = from[j]
			}
		}
		for i := range items {
			next[i] = append(next[i], from[i])
		}
	}
	switch {
	case !right && repeat != "":
		return repeat + "\nor, where the id is forgotten by now:\n" + wrong
	case !right:
		return wrong
	}
	for i := range cs {
		m.learn(placeOf(&cs[i]), next[i])
	}
	if err == nil && cs[0].ID != "" && quota.Granted(got) && !driver.OnlyPeeks(cs) {
		m.granted[id] = grant{slices.Clone(cs), slices.Clone(got), after(now, driver.IDLifetime(cs, now))}
	}
	return ""
}

// sameKey returns the index of the first charge to the limit and key of another, which is of another alternative, or -1.
func sameKey(cs []quota.Charge, c *quota.Charge) int {
	return slices.IndexFunc(cs, func(o quota.Charge) bool { return placeOf(&o) == placeOf(c) })
}

// options returns the states that the store may decide on: those that it may hold, and a fresh one where it may have
// forgotten.
func (m *model) options(p place) []held {
	all := slices.Clone(m.places[p])
	fresh := len(all) == 0
	for i := range all {
		all[i].Write = false
		fresh = fresh || all[i].until <= m.seen
	}
	if fresh && !slices.ContainsFunc(all, func(h held) bool { return h.State.IsZero() }) {
		all = append(all, held{until: math.MaxInt64})
	}
	return all
}

// learn keeps the states that explain an answer, each once. A state that the answer did not use may still be there.
func (m *model) learn(p place, next []held) {
	for _, h := range m.places[p] {
		if h.until <= m.seen && slices.ContainsFunc(next, func(n held) bool { return n.State.IsZero() && !n.Write }) {
			h.Write = false
			next = append(next, h)
		}
	}
	var each []held
	for _, h := range next {
		h.Write = false
		if h.State.IsZero() {
			h = held{until: math.MaxInt64}
		}
		if !slices.ContainsFunc(each, func(e held) bool { return same(&e, &h) }) {
			each = append(each, h)
		}
	}
	m.places[p] = each
}

func same(a, b *held) bool {
	return a.Rule == b.Rule && sameState(a.State, b.State) && a.until == b.until
}

// after returns when a span from now is over.
func after(now quota.Micros, span time.Duration) quota.Micros {
	if span == quota.Never {
		return math.MaxInt64
	}
	return now + quota.Micros(span/time.Microsecond)
}

// check returns the fault of the answer to charges whose id was granted, or "".
func (g *grant) check(cs []quota.Charge, got []quota.Decision, err error) string {
	told := "the id was granted to" + show(g.charges) + "\n"
	if !slices.EqualFunc(g.charges, cs, driver.SameCharge) {
		if !errors.Is(err, quota.ErrInvalid) {
			return fmt.Sprintf("%s%s\n\twant quota.ErrInvalid", told, answer(got, err))
		}
		return ""
	}
	want := slices.Clone(g.decisions)
	for i := range want {
		want[i].Replayed = true
		// The limit's numbers may have changed since; the grant has not.
		if err == nil && *g.charges[i].Limit.Spec() != *cs[i].Limit.Spec() {
			want[i].Capacity, want[i].Remaining, want[i].ResetAfter = got[i].Capacity, got[i].Remaining, got[i].ResetAfter
		}
	}
	if wrong := differ(got, err, want, nil); wrong != "" {
		return told + wrong
	}
	return ""
}
