package resilience_test

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"testing/synctest"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/resilience"
)

// A hold is made and spent on this instance's share while the primary is down. With the primary up again it is the primary's too,
// and is renewed and spent on the share all the same. A hold of the primary stays the primary's.
func TestFallbackHolds(t *testing.T) {
	held := quota.NewLimit("held", algorithm.Held(algorithm.TokenBucket(100, 1, time.Hour), time.Minute))
	of := func(op quota.Op, n int64) quota.Charge {
		return quota.Charge{Limit: held, Key: "team/agent", Op: op, Cost: n}
	}
	inOutage(t, func(o *outage) {
		hold := of(quota.OpHold, 1)
		want := func(d quota.Decision, source quota.Source, allowed bool, holds, charged, left int64) quota.Decision {
			t.Helper()
			if d.Source != source || d.Allowed != allowed || d.Held != holds || d.Until > 0 != (holds > 0) || d.Charged != charged || d.Remaining != left {
				t.Errorf("got %v; want of the %v: allowed %v, %d held, %d charged, %d left", d, source, allowed, holds, charged, left)
			}
			return d
		}
		first := want(o.do(of(quota.OpHold, 40)), store, true, 40, 0, 60)
		o.down()
		for _, c := range []quota.Charge{hold.Settle(first, 10), hold.Renew(first)} {
			_, err := o.s.Charge(bg, c)
			wantErr(t, err, quota.ErrUnavailable)
		}
		one := want(o.do(of(quota.OpHold, 10)), fall, true, 10, 0, 5) // a quarter of what was left
		want(o.do(of(quota.OpHold, 6)), fall, false, 0, 0, 5)
		want(o.do(hold.Settle(one, 3)), fall, true, 0, 3, 12)
		two := want(o.do(of(quota.OpHold, 5)), fall, true, 5, 0, 7)
		three := want(o.do(of(quota.OpHold, 6)), fall, true, 6, 0, 1)
		two = want(o.do(hold.Renew(two)), fall, true, 5, 0, 1)
		o.up()
		want(o.do(of(quota.OpPeek, 0)), store, true, 0, 0, 46) // 40 are held, 3 were spent, and 11 are held on the share
		two = want(o.do(hold.Renew(two)), fall, true, 5, 0, 1)
		want(o.do(hold.Settle(three, 4)), fall, true, 0, 4, 3)
		want(o.do(of(quota.OpPeek, 0)), store, true, 0, 0, 48)
		want(o.do(hold.Settle(two, 1)), fall, true, 0, 1, 7)
		want(o.do(of(quota.OpPeek, 0)), store, true, 0, 0, 52)
		want(o.do(hold.Settle(first, 0)), store, true, 0, 0, 92)
		time.Sleep(2 * time.Minute)
		want(o.do(of(quota.OpPeek, 0)), store, true, 0, 0, 92)
	})
}

// leftInStore fails unless the primary has so many of the limit's tokens left.
func (o *outage) leftInStore(l *quota.Limit, want int64, when string) {
	o.t.Helper()
	d, err := o.r.Store.Charge(bg, quota.Charge{Limit: l, Key: "k", Op: quota.OpPeek})
	if err != nil || d.Remaining != want {
		o.t.Errorf("left in the store %s: got %d, %v; want %d", when, d.Remaining, err, want)
	}
}

var eight = quota.NewLimit("streams", algorithm.Concurrency(8, time.Minute))

func slotOf(op quota.Op, n int64) quota.Charge {
	return quota.Charge{Limit: eight, Key: "k", Op: op, Cost: n}
}

var daily = quota.NewLimit("held", algorithm.Held(algorithm.FixedWindow(100, 24*time.Hour), time.Minute))

func heldOf(op quota.Op, n int64) quota.Charge {
	return quota.Charge{Limit: daily, Key: "k", Op: op, Cost: n}
}

// Slots that were taken on a share are taken in the store from the first call on that it answers, also where it has given all of its
// own; they stay taken for as long as they are renewed, and come back once, and nobody else's do.
func TestFallbackHoldsAreTheStores(t *testing.T) {
	inOutage(t, func(o *outage) {
		slot := slotOf(quota.OpHold, 1)
		o.down()
		one, two := o.do(slot), o.do(slot)
		if d := o.do(slot); d.Allowed || one.Source != fall || !two.Allowed {
			t.Fatalf("a third slot of a share of two: got %v, want a denial", d)
		}
		if _, err := o.r.Store.Charge(bg, slotOf(quota.OpHold, 8)); err != nil { // of another instance, to which the store answers
			t.Fatal(err)
		}
		o.up()
		o.want(slotOf(quota.OpPeek, 0), store, false, -2)
		o.r.calls()
		o.want(slotOf(quota.OpPeek, 0), store, false, -2)
		o.asked("peek 0") // once
		for range 30 {
			time.Sleep(20 * time.Second)
			one, two = o.do(slot.Renew(one)), o.do(slot.Renew(two))
			if !one.Allowed || !two.Allowed {
				t.Fatalf("renewals: got %v and %v, want them allowed", one, two)
			}
		}
		o.leftInStore(eight, 6, "after ten ttl, in which the other instance's slots have lapsed")
		if _, err := o.r.Store.Charge(bg, slotOf(quota.OpHold, 6)); err != nil { // they lapse with the share's
			t.Fatal(err)
		}
		release := slot.Settle(one, 1) // a slot comes back whatever the cost
		release.ID = "once"
		for range 3 {
			o.do(release)
			o.leftInStore(eight, 1, "after a release, and after its repeats")
		}
		if d := o.do(slot.Renew(one)); d.Allowed && d.Held > 0 && d.Until != two.Until {
			t.Errorf("renewal of a slot that was released: got %v, want a denial", d)
		}
		time.Sleep(65 * time.Second) // the process forgot the second
		o.want(slotOf(quota.OpPeek, 0), store, true, 8)
	})
}

// A hold of a share lives on through outages and the time between them, and the share has no more for it.
func TestFallbackHoldsOutliveOutages(t *testing.T) {
	inOutage(t, func(o *outage) {
		slot := slotOf(quota.OpHold, 1)
		o.down()
		one, two := o.do(slot), o.do(slot)
		for i := range 10 {
			o.up()
			o.want(slotOf(quota.OpPeek, 0), store, true, 6)
			time.Sleep(15 * time.Second)
			if one = o.do(slot.Renew(one)); i%2 == 0 {
				two = o.do(slot.Renew(two))
			}
			o.down()
			if d := o.do(slot); d.Allowed {
				t.Fatalf("a third slot of a share of two in outage %d: got %v, want a denial", i, d)
			}
			time.Sleep(15 * time.Second)
			if i%2 == 1 {
				one = o.do(slot.Renew(one))
			}
			if two = o.do(slot.Renew(two)); !one.Allowed || !two.Allowed {
				t.Fatalf("renewals in outage %d: got %v and %v, want them allowed", i, one, two)
			}
		}
		o.do(slot.Settle(one, 0))
		if d := o.do(slot); !d.Allowed {
			t.Errorf("a slot when one has come back: got %v, want it allowed", d)
		}
	})
}

// Where there is no room for all keys, those with holds are kept.
func TestFallbackHoldsAreNotForgotten(t *testing.T) {
	withFallback(t, resilience.Instances(4), 64, func(o *outage) {
		o.down()
		o.do(slotOf(quota.OpHold, 2))
		o.up()
		o.want(slotOf(quota.OpPeek, 0), store, true, 6)
		for i := range 1000 {
			o.do(quota.Charge{Limit: limit, Key: fmt.Sprint("other/", i), Cost: 40}) // more than the slots' key, and little enough to make room for it
		}
		o.down()
		if d := o.do(slotOf(quota.OpHold, 1)); d.Allowed {
			t.Errorf("a third slot of a share of two: got %v, want a denial", d)
		}
	})
}

// A hold that its process forgets comes back in the store when it lapses on the share, in front of the key's next call.
func TestFallbackHoldsLapse(t *testing.T) {
	inOutage(t, func(o *outage) {
		o.down()
		o.do(slotOf(quota.OpHold, 2))
		time.Sleep(40 * time.Second)
		o.up()
		o.want(slotOf(quota.OpPeek, 0), store, true, 6)
		time.Sleep(25 * time.Second)
		o.leftInStore(eight, 6, "when they have lapsed on the share")
		o.want(slotOf(quota.OpPeek, 0), store, true, 8)
	})
}

// The store's answer is lost, and its state: the share's slots are taken there once, and once more where the state was lost.
func TestFallbackHoldsAreToldOnce(t *testing.T) {
	inOutage(t, func(o *outage) {
		slot := slotOf(quota.OpHold, 1)
		o.down()
		one, two := o.do(slot), o.do(slot)
		for _, lose := range []string{"the hold", "a release"} {
			o.r.set(nil, as(quota.ErrIndeterminate))
			if lose == "a release" {
				o.do(slot.Settle(two, 0))
			} else if d := o.do(slotOf(quota.OpPeek, 0)); d.Source != fall {
				t.Errorf("a peek of which the answer is lost: got %v, want the fallback's", d)
			}
			for range 2 {
				o.up()
				o.want(slotOf(quota.OpPeek, 0), store, true, map[string]int64{"the hold": 6, "a release": 7}[lose])
			}
		}
		o.down()
		if d := o.do(slotOf(quota.OpHold, 2)); d.Allowed {
			t.Errorf("two slots of a share of two of which one is held: got %v, want a denial", d)
		}
		o.up()
		o.do(slotOf(quota.OpPeek, 0))
		o.r.Store.Charge(bg, slotOf(quota.OpReset, 0)) // as a store that began anew
		time.Sleep(30 * time.Second)
		if d := o.do(slot.Renew(one)); !d.Allowed || d.Source != fall {
			t.Errorf("a renewal: got %v, want the share's", d)
		}
		o.leftInStore(eight, 7, "after a loss of its state and a renewal")
		o.do(slotOf(quota.OpReset, 0)) // a reset of the key is one of the share's slots too
		o.leftInStore(eight, 8, "after a reset")
		time.Sleep(30 * time.Second)
		o.do(slotOf(quota.OpPeek, 0))
		o.leftInStore(eight, 8, "after a reset and a call")
	})
}

// Tokens of another rule are held in the store where they fit, and where they do not when they do; their costs are charged there.
func TestFallbackHoldsWithoutRoom(t *testing.T) {
	inOutage(t, func(o *outage) {
		o.down()
		one := o.do(heldOf(quota.OpHold, 20))
		if _, err := o.r.Store.Charge(bg, heldOf(quota.OpTake, 90)); err != nil {
			t.Fatal(err)
		}
		o.up()
		o.want(heldOf(quota.OpPeek, 0), store, true, 10) // 20 do not fit
		o.r.calls()
		o.want(heldOf(quota.OpPeek, 0), store, true, 10)
		o.asked("peek 0") // it is not asked each time
		o.r.Store.Charge(bg, heldOf(quota.OpReset, 0))
		o.r.Store.Charge(bg, heldOf(quota.OpTake, 50))
		time.Sleep(20 * time.Second)
		one = o.do(heldOf(quota.OpHold, 0).Renew(one))
		o.leftInStore(daily, 30, "when they fit")
		o.do(heldOf(quota.OpHold, 0).Settle(one, 35))
		o.leftInStore(daily, 15, "after a settle")
	})
}

// A settle between two outages, of which the store could not be told yet, is taken of the share in the second.
func TestFallbackHoldsFinishedBetween(t *testing.T) {
	inOutage(t, func(o *outage) {
		o.down()
		one := o.do(heldOf(quota.OpHold, 5))
		o.up()
		o.want(heldOf(quota.OpPeek, 0), store, true, 95)
		o.down()
		if d := o.do(heldOf(quota.OpHold, 0).Settle(one, 20)); d.Source != fall || d.Remaining != 5 {
			t.Errorf("a settle: got %v, want 5 of the share's 25 left", d)
		}
		o.want(heldOf(quota.OpHold, 6), fall, false, 5)
		o.up()
		o.want(heldOf(quota.OpPeek, 0), store, true, 80)
	})
}

// A list that finishes holds of a share may have corrections of the store beside them, and no charge that the store may deny.
func TestFallbackHoldsInLists(t *testing.T) {
	inOutage(t, func(o *outage) {
		slot, out := slotOf(quota.OpHold, 1), make([]quota.Decision, 2)
		tokens := quota.Charge{Limit: limit, Key: "k", Cost: 10}
		o.down()
		if err := o.s.ChargeAll(bg, []quota.Charge{slot, tokens}, out); err != nil || !quota.Granted(out) {
			t.Fatalf("got %v, %v; want a grant", out, err)
		}
		one := out[0]
		o.up()
		wantErr(o.t, o.s.ChargeAll(bg, []quota.Charge{slot.Renew(one), tokens}, out), quota.ErrCrossSlot)
		list := []quota.Charge{slot.Settle(one, 0), {Limit: limit, Key: "k", Op: quota.OpDebit, Cost: 5}}
		list[0].ID, list[1].ID = "x", "x"
		for range 2 {
			if err := o.s.ChargeAll(bg, list, out); err != nil || !quota.Granted(out) || out[0].Source != fall || out[1].Source != store {
				t.Errorf("a settle and a debit: got %v, %v; want both", out, err)
			}
			o.leftInStore(eight, 8, "after the settle")
			o.leftInStore(limit, 85, "after the settle")
		}
	})
}

// ofFleet is a store that outlives the instances on it.
type ofFleet struct{ quota.Store }

func (ofFleet) Close() error { return nil }

// TestFallbackFleetOfHolders has four instances hold slots, renew them, give them back, and forget them, while the store comes and
// goes. At most as many are in use as the store and the shares have, B + Σ b_i; once each instance has called the store, it grants a
// slot only below B; and an outage of more than a TTL leaves Σ b_i. With each second seed the store flaps and is not asked for slots, so
// it cannot deny what the shares give in one outage after another: Σ b_i at all times, of which each instance gets one in the first.
func TestFallbackFleetOfHolders(t *testing.T) {
	const whole, shares = 8, 8
	full := 0 // seeds in which all slots of the shares alone were in use
	for seed := range uint64(sized(30, 500)) {
		flaps := seed%2 == 1
		synctest.Test(t, func(t *testing.T) {
			rng := rand.New(rand.NewPCG(seed, 1))
			r := &remote{Store: local.New()}
			type holder struct {
				d   quota.Decision
				by  int
				due time.Time
			}
			var fleet [4]quota.Store
			for i := range fleet {
				fleet[i] = wrap(t, ofFleet{r}, resilience.Fallback(local.New(), resilience.Instances(4), nil))
			}
			var open []*holder
			slot := slotOf(quota.OpHold, 1)
			most, mostDown, mostGranted := 0, 0, 0
			since := time.Now() // of the store's latest outage
			up, told := true, true
			for range 1000 {
				time.Sleep(time.Duration(rng.Int64N(int64(time.Second))))
				now := time.Now()
				if lasts := map[bool]int{false: 120, true: 4}[flaps]; rng.IntN(lasts) == 0 {
					if up, told = !up, false; up {
						r.set(nil, nil)
					} else {
						r.set(as(quota.ErrUnavailable), nil)
						since = now
					}
				}
				for i := 0; i < len(open); i++ {
					h := open[i]
					switch {
					case rng.IntN(200) == 0: // it ends its work
						fleet[h.by].Charge(bg, slot.Settle(h.d, 1)) // or else it lapses
					case rng.IntN(400) == 0: // it dies: it is not in use any more
					case now.Before(h.due):
						continue
					default:
						if d, err := fleet[h.by].Charge(bg, slot.Renew(h.d)); err == nil && d.Allowed {
							h.d, h.due = d, now.Add(20*time.Second)
							continue
						} else if err != nil && now.Sub(h.due) < 40*time.Second {
							continue // it may try again
						}
					}
					open[i], open = open[len(open)-1], open[:len(open)-1]
					i--
				}
				for by := range fleet {
					c := slot
					if up && flaps {
						c = slotOf(quota.OpPeek, 1)
					}
					if d, err := fleet[by].Charge(bg, c); err != nil {
						t.Fatal(err)
					} else if d.Allowed && c.Op == quota.OpHold {
						open = append(open, &holder{d, by, now.Add(20 * time.Second)})
						if d.Source == store && told {
							mostGranted = max(mostGranted, len(open))
						}
					}
				}
				told = up
				most = max(most, len(open))
				if !up && now.Sub(since) > 65*time.Second { // the store's own have lapsed
					mostDown = max(mostDown, len(open))
				}
			}
			least, atMost := whole, whole+shares
			if flaps {
				if least, atMost = len(fleet), shares; most == shares {
					full++
				}
			}
			if most < least || most > atMost {
				t.Errorf("seed %d: slots in use: got %d, want %d to %d", seed, most, least, atMost)
			}
			if mostGranted > whole || mostDown > shares {
				t.Errorf("seed %d: slots in use: got %d with a grant of the store, and %d in a long outage; want at most %d and %d", seed, mostGranted, mostDown, whole, shares)
			}
			for i := range fleet {
				fleet[i].Close()
			}
		})
	}
	if full == 0 {
		t.Errorf("no seed had all %d slots of the shares in use", shares)
	}
}

// Of two slots an instance of four has a share of none, and with AtLeastOne it refuses the limit: two are not eight.
func TestFallbackConcurrency(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		streams := quota.NewLimit("streams", algorithm.Concurrency(2, time.Minute))
		for _, least := range []bool{false, true} {
			r := &remote{Store: local.New()}
			r.set(as(quota.ErrUnavailable), nil)
			for range 4 {
				s := wrap(t, ofFleet{r}, resilience.Fallback(local.New(), resilience.Instances(4), &resilience.FallbackOptions{AtLeastOne: least}))
				for _, op := range []quota.Op{quota.OpHold, quota.OpTake} {
					switch d, err := s.Charge(bg, quota.Charge{Limit: streams, Key: "k", Op: op, Cost: 1}); {
					case least:
						wantErr(t, err, quota.ErrInvalid)
					case err != nil || d.Allowed || d.Source != fall:
						t.Errorf("%v of a share of none: got %v, %v; want a denial of the fallback", op, d, err)
					}
				}
				if err := s.Close(); err != nil {
					t.Error(err)
				}
			}
		}
	})
}

// A memory of denials keeps none of a limit with holds: tokens come back when a hold ends, long before RetryAfter.
func TestMemoryOfHolds(t *testing.T) {
	streams := quota.NewLimit("streams", algorithm.Concurrency(1, time.Minute))
	r := &remote{Store: local.New()}
	s := wrap(t, r, resilience.DenialMemory(nil))
	take := func(op quota.Op) quota.Decision {
		t.Helper()
		d, err := s.Charge(bg, quota.Charge{Limit: streams, Key: "k", Op: op, Cost: 1})
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	first := take(quota.OpHold)
	for _, op := range []quota.Op{quota.OpHold, quota.OpTake} {
		if d := take(op); d.Allowed {
			t.Fatalf("a second %v: got %v, want it denied", op, d)
		}
	}
	// Another process ends the hold.
	if _, err := r.Store.Charge(bg, quota.Charge{Limit: streams, Key: "k", Op: quota.OpHold}.Settle(first, 0)); err != nil {
		t.Fatal(err)
	}
	for _, op := range []quota.Op{quota.OpTake} {
		if d := take(op); !d.Allowed || d.Source != store {
			t.Errorf("a %v when the hold has ended: got %v, want the store's grant", op, d)
		}
	}
}
