package quota

import (
	"context"
	"slices"
	"sync"
	"time"
)

// A Call is a call of a [Limiter] or [Charger] and its outcome, as observers get it when the call is over. Each call of a method
// that asks a store is one: a list is one Call, and so is a Wait, however often it asked. Sums over calls are right
// without more: [Decision.Charged] is the tokens of each charge.
//
// Observers must not modify a Call, for all of them get the same, nor keep it or its slices when they return: its memory
// serves the next call. [Call.Clone] makes a copy to keep.
type Call struct {
	// Charges are the charges, with the limits that the limiter chose. Of a call that was Refused they are as the caller gave
	// them, with keys of any length and bytes, and of a Charger perhaps without a limit.
	Charges []Charge
	// Decisions are the answers to the charges, in their order; nil where Err is not nil.
	Decisions []Decision
	// Granted says that all charges were made. Where it is false, and Err is nil, the call was denied: no charge was.
	Granted bool
	// Decider is the index of the charge that decided the call, as in a Result; 0 where Err is not nil.
	Decider int
	// Err is the error that the caller got, or nil; of Allow and AllowAll it is the error of Take and ChargeAll.
	Err error
	// Refused says that the limiter asked the store nothing: Err is about the call itself, such as an invalid key or a
	// context that had ended, or about a bound of this process.
	Refused bool
	// Took is the time of the call without Waited.
	Took time.Duration
	// Waited is the time that Wait and WaitAll waited for their turn and for quota; 0 for other methods.
	Waited time.Duration
}

// Clone returns a copy of the call that may be kept.
func (c *Call) Clone() *Call {
	kept := *c
	kept.Charges, kept.Decisions = slices.Clone(c.Charges), slices.Clone(c.Decisions)
	return &kept
}

// observed is a call that is under way, in one piece of memory with its charge and decision if it has one of each. A nil
// *observed stands for a call that has no observers and does not wait.
type observed struct {
	Call
	charge   [1]Charge
	decision [1]Decision
	began    time.Duration // see now
	asked    bool
}

// observedPool saves an observed Take the time of an allocation, which is more than all else that observing takes.
var observedPool = sync.Pool{New: func() any { return new(observed) }}

// begin returns the call of a list that begins now.
func begin(cs []Charge, ds []Decision) *observed {
	o := observedPool.Get().(*observed)
	o.Charges, o.Decisions, o.began = cs, ds, now()
	return o
}

// observe returns the call of a list that begins now, or nil where the charger has no observers. Of a single charge there is
// no list yet: see overOne.
func (ch *Charger) observe(cs []Charge, ds []Decision) *observed {
	if ch.observer == nil {
		return nil
	}
	return begin(cs, ds)
}

// beginOne returns the call of a charge that waits and begins now. The charge is then o.charge[0].
func beginOne(c *Charge) *observed {
	o := begin(nil, nil)
	o.charge[0] = *c
	o.Charges, o.Decisions = o.charge[:], o.decision[:]
	return o
}

// now returns the time since the program began, which takes half as long to tell as time.Now.
func now() time.Duration { return time.Since(programBegan) }

var programBegan = time.Now()

// ask notes that the store is about to be asked.
func (o *observed) ask() {
	if o != nil {
		o.asked = true
	}
}

// waits notes that the caller waits from now on, and returns the function that notes the end.
func (o *observed) waits() (end func()) {
	from := now()
	return func() { o.Waited += now() - from }
}

// overOne is over for the call of a single charge, which it gets with its decision only now: a copy of numbers that were written
// just before has to wait for them. It is [observed.end] in fewer steps, for a Take in memory takes little longer than observing it.
func (ch *Charger) overOne(ctx context.Context, o *observed, c *Charge, d *Decision, err error) {
	o.Took = now() - o.began
	o.charge[0], o.Charges = *c, o.charge[:]
	if err != nil {
		o.Err, o.Refused = err, !o.asked
		o.charge[0].Op = c.Op.observed()
	} else {
		o.decision[0] = *d
		o.Decisions, o.Granted = o.decision[:], d.Allowed || d.Shadow
	}
	ch.observer(ctx, &o.Call)
	o.Call, o.charge, o.asked = Call{}, [1]Charge{}, false
	observedPool.Put(o)
}

// over tells the observers of the outcome of a call whose limiter has a limit of its own, or nil. o must not be used any more; nil
// is told to none.
func (ch *Charger) over(ctx context.Context, own *Limit, o *observed, err error) {
	if o == nil {
		return
	}
	if ch.observer != nil {
		o.end(own, err)
		ch.observer(ctx, &o.Call)
	}
	*o = observed{}
	observedPool.Put(o)
}

// end notes the call's outcome.
func (o *observed) end(own *Limit, err error) {
	o.Took = now() - o.began - o.Waited
	if o.Err = err; err != nil {
		o.Decisions, o.Refused = nil, !o.asked
	} else {
		o.Granted, o.Decider = Granted(o.Decisions), Decider(o.Decisions)
	}
	for i := range o.Charges {
		c := &o.Charges[i]
		if c.Limit == nil {
			c.Limit = own
		}
		c.Op = c.Op.observed()
	}
}

// observed returns the operation as observers get it: a correction that its receipt does not allow is a refund.
func (o Op) observed() Op {
	if o >= opOfDenial && o <= opExcessive {
		return OpRefund
	}
	return o
}

// compose returns one observer that calls all of them, in their order; nil for none.
func compose(observers []func(context.Context, *Call)) func(context.Context, *Call) {
	switch len(observers) {
	case 0:
		return nil
	case 1:
		return observers[0]
	}
	return func(ctx context.Context, c *Call) {
		for _, observe := range observers {
			observe(ctx, c)
		}
	}
}
