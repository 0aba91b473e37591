package driver_test

import (
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/internal/testkit"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

func TestSameCharge(t *testing.T) {
	a, b, again := testkit.Bucket("a", 10, time.Second), testkit.Bucket("b", 10, time.Second), testkit.Bucket("a", 20, time.Second)
	c := quota.Charge{Limit: a, Key: "k", Cost: 1, Op: quota.OpRefund, At: 3, ID: "x"}
	same := c
	same.Limit, same.ID = again, "y" // the name is what a store keeps
	if !driver.SameCharge(c, c) || !driver.SameCharge(c, same) {
		t.Error("equal charges differ")
	}
	for name, change := range map[string]func(*quota.Charge){
		"limit": func(c *quota.Charge) { c.Limit = b }, "key": func(c *quota.Charge) { c.Key = "l" }, "cost": func(c *quota.Charge) { c.Cost++ },
		"op": func(c *quota.Charge) { c.Op = quota.OpDebit }, "time": func(c *quota.Charge) { c.At++ },
	} {
		d := c
		if change(&d); driver.SameCharge(c, d) {
			t.Errorf("another %s is the same charge", name)
		}
	}
}
