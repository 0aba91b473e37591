package driver_test

import (
	"encoding/hex"
	"fmt"
	"hash/maphash"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/internal/testkit"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

func TestSameCharge(t *testing.T) {
	a, b, again := testkit.Bucket("a", 10, time.Second), testkit.Bucket("b", 10, time.Second), testkit.Bucket("a", 20, time.Second)
	c := quota.Charge{Limit: a, Key: "k", Cost: 1, Op: quota.OpRefund, MadeAt: 3, ID: "x"}
	same := c
	same.Limit, same.ID = again, "y" // a store keeps no more of the limit than its name
	if !driver.SameCharge(c, c) {
		t.Error("SameCharge of a charge and itself: got false, want true")
	}
	if !driver.SameCharge(c, same) {
		t.Error("SameCharge with another capacity and another id: got false, want true")
	}
	for name, change := range map[string]func(*quota.Charge){
		"limit": func(c *quota.Charge) { c.Limit = b }, "key": func(c *quota.Charge) { c.Key = "l" }, "cost": func(c *quota.Charge) { c.Cost++ },
		"op": func(c *quota.Charge) { c.Op = quota.OpDebit }, "time": func(c *quota.Charge) { c.MadeAt++ },
		"delay": func(c *quota.Charge) { c.Within++ }, "floor": func(c *quota.Charge) { c.Floor++ }, "part": func(c *quota.Charge) { c.FloorOf++ }, "least": func(c *quota.Charge) { c.Least++ }, "shadow": func(c *quota.Charge) { c.Shadow = true }, "list": func(c *quota.Charge) { c.Alternative++ },
	} {
		d := c
		if change(&d); driver.SameCharge(c, d) {
			t.Errorf("SameCharge with another %s: got true, want false", name)
		}
	}
}

// A fingerprint differs wherever SameCharge does, and in the order and number of the charges.
func TestFingerprint(t *testing.T) {
	limit, other := testkit.Bucket("n", 10, time.Second), testkit.Bucket("m", 10, time.Second)
	c := quota.Charge{Limit: limit, Key: "g/k", Cost: 1}
	with := func(change func(*quota.Charge)) quota.Charge {
		d := c
		change(&d)
		return d
	}
	lists := map[string][]quota.Charge{
		"one": {c}, "none": {}, "twice": {c, c},
		"limit":       {with(func(c *quota.Charge) { c.Limit = other })},
		"key":         {with(func(c *quota.Charge) { c.Key = "g/j" })},
		"cost":        {with(func(c *quota.Charge) { c.Cost = 11 })},
		"op":          {with(func(c *quota.Charge) { c.Op = quota.OpDebit })},
		"at":          {with(func(c *quota.Charge) { c.MadeAt = 1 })},
		"within":      {with(func(c *quota.Charge) { c.Within = 1 })},
		"floor":       {with(func(c *quota.Charge) { c.Floor = 1 })},
		"part":        {with(func(c *quota.Charge) { c.Floor, c.FloorOf = 1, 2 })},
		"least":       {with(func(c *quota.Charge) { c.Least = 1 })},
		"shadow":      {with(func(c *quota.Charge) { c.Shadow = true })},
		"list":        {with(func(c *quota.Charge) { c.Alternative = 1 })},
		"order":       {c, with(func(c *quota.Charge) { c.Key = "g/j" })},
		"other order": {with(func(c *quota.Charge) { c.Key = "g/j" }), c},
		"digits":      {with(func(c *quota.Charge) { c.Cost, c.MadeAt = 1, 11 })},
		"more digits": {with(func(c *quota.Charge) { c.Cost, c.MadeAt = 11, 1 })},
	}
	seen := map[[16]byte]string{}
	for name, cs := range lists {
		sum := driver.Fingerprint(cs)
		if twin, twice := seen[sum]; twice {
			t.Errorf("fingerprint of %q: got that of %q, want another", name, twin)
		}
		seen[sum] = name
	}
	same := []quota.Charge{with(func(c *quota.Charge) {
		c.ID, c.From, c.Limit = "id", quota.FromLease, testkit.Bucket("n", 20, time.Second)
	})}
	if got, want := driver.Fingerprint(same), driver.Fingerprint(lists["one"]); got != want {
		t.Errorf("fingerprint of a repeat: got %x, want %x", got, want)
	}
	// Stores keep it with ids, so it must not change from release to release.
	if got, want := hex.EncodeToString(sum16(driver.Fingerprint(lists["order"]))), "bcdf15db3e88af21982296003c1486ea"; got != want {
		t.Errorf("fingerprint: got %s, want %s", got, want)
	}
}

func sum16(sum [16]byte) []byte { return sum[:] }

func TestHash(t *testing.T) {
	seed := maphash.MakeSeed()
	c := quota.Charge{Limit: testkit.Bucket("n", 10, time.Second), Key: "k"}
	same := quota.Charge{Limit: testkit.Bucket("n", 20, time.Second), Key: "k", Cost: 3}
	if driver.Hash(seed, &c) != driver.Hash(seed, &same) {
		t.Error("hashes of one limit and key: got two, want one")
	}
	hashes := map[uint64]bool{}
	for i := range 1000 {
		for _, name := range []string{"n", "m"} {
			hashes[driver.Hash(seed, &quota.Charge{Limit: testkit.Bucket(name, 10, time.Second), Key: fmt.Sprint(i)})] = true
		}
	}
	if len(hashes) != 2000 {
		t.Errorf("hashes of 2000 limits and keys: got %d, want 2000", len(hashes))
	}
}
