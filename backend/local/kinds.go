package local

import (
	"unique"

	"github.com/fleetquota/fleetquota/quota"
)

// kind is the part of a slot that nearly all slots of a limit have in common: the limit's name, and the rule
// and unit of the state.
type kind struct {
	limit unique.Handle[string]
	rule  quota.Rule
	unit  int64
}

// kinds numbers the kinds in use, so that a slot holds a number and no pointer. They are few.
type kinds []numbered

type numbered struct {
	kind
	slots int // the slots of this kind; 0 is a free number
}

// add counts one more slot of a kind and returns its number.
func (ks *kinds) add(k kind) uint32 {
	id := len(*ks)
	for i := range *ks {
		switch have := &(*ks)[i]; {
		case have.slots == 0:
			id = i
		case have.kind == k:
			have.slots++
			return uint32(i)
		}
	}
	if id == len(*ks) {
		*ks = append(*ks, numbered{})
	}
	(*ks)[id].kind, (*ks)[id].slots = k, 1
	return uint32(id)
}

// drop counts one slot less.
func (ks kinds) drop(id uint32) {
	if ks[id].slots--; ks[id].slots == 0 {
		ks[id].kind = kind{}
	}
}
